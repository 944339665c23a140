"""The oracle: the recurrence as it is written in api.py, one token after the other, in float64."""

import torch
from torch import Tensor


def recurrence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    *,
    bounds: list[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output [B, T, Hq, V] and final state [N, H, K, V], both float64.

    bounds: first token of every sequence in the flattened [B * T] tokens, and the end.
    """
    batch, length, heads = query.shape[:3]
    kv_heads = key.shape[2]
    decay = torch.ones((), dtype=torch.float64, device=query.device)
    decay = decay if log_decay is None else log_decay.double().exp()
    decay = decay.expand(batch, length, kv_heads).flatten(0, 1)[..., None, None]
    query, key, value, beta = (x.double().flatten(0, 1) for x in (query, key, value, beta))
    if state is None:
        state = query.new_zeros(len(bounds) - 1, kv_heads, key.shape[2], value.shape[2])

    outputs, ends = [], []
    for n in range(len(bounds) - 1):
        memory = state[n].double()
        for t in range(bounds[n], bounds[n + 1]):
            k, v = key[t], value[t]
            predicted = torch.einsum("hk,hkv->hv", k, memory)
            memory = memory - beta[t, :, None, None] * k[:, :, None] * predicted[:, None, :]
            memory = decay[t] * memory + beta[t, :, None, None] * k[:, :, None] * v[:, None, :]
            shared = memory.repeat_interleave(heads // kv_heads, 0)
            outputs.append(scale * torch.einsum("hk,hkv->hv", query[t], shared))
        ends.append(memory)
    return torch.stack(outputs).unflatten(0, (batch, length)), torch.stack(ends)
