"""The oracle: the recurrence as it is written in api.py, one token after the other, in float64."""

import torch
from torch import Tensor


def recurrence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    state: tuple[Tensor | None, Tensor | None],
    *,
    bounds: list[int],
    normalized: bool,
    scale: float,
    eps: float,
) -> tuple[Tensor, tuple[Tensor, Tensor | None]]:
    """Output [B, T, Hq, V] and final state, all float64.

    state: memory and normalizer before the first token, None for zeros; one per sequence.
    bounds: first token of every sequence in the flattened [B * T] tokens, and the end.
    """
    batch, length, heads = query.shape[:3]
    state_heads = key.shape[2] if log_decay is None else log_decay.shape[-1]
    decay = torch.ones((), dtype=torch.float64, device=query.device)
    decay = decay if log_decay is None else log_decay.double().exp()
    decay = decay.expand(batch, length, state_heads).flatten(0, 1)
    zeros = torch.zeros(
        len(bounds) - 1, state_heads, key.shape[3], value.shape[3],
        dtype=torch.float64, device=query.device,
    )  # fmt: skip
    first = zeros if state[0] is None else state[0]
    first_normalizer = zeros[..., 0] if state[1] is None else state[1]
    query, key, value = (x.double().flatten(0, 1) for x in (query, key, value))

    def per_query_head(x: Tensor) -> Tensor:
        return x.repeat_interleave(heads // x.shape[0], 0)

    def per_state_head(x: Tensor) -> Tensor:
        return x.repeat_interleave(state_heads // x.shape[0], 0)

    outputs, memories, normalizers = [], [], []
    for n in range(len(bounds) - 1):
        memory = first[n].double()
        normalizer = first_normalizer[n].double() if normalized else None
        for t in range(bounds[n], bounds[n + 1]):
            k, v = per_state_head(key[t]), per_state_head(value[t])
            memory = decay[t, :, None, None] * memory + k[:, :, None] * v[:, None, :]
            output = torch.einsum("hk,hkv->hv", query[t], per_query_head(memory))
            if normalizer is None:
                output = scale * output
            else:
                normalizer = decay[t, :, None] * normalizer + k
                weight = (query[t] * per_query_head(normalizer)).sum(-1, keepdim=True)
                output = output / (weight + eps)
            outputs.append(output)
        memories.append(memory)
        normalizers.append(normalizer)
    memory = torch.stack(memories)
    normalizer = torch.stack(normalizers) if normalized else None
    return torch.stack(outputs).unflatten(0, (batch, length)), (memory, normalizer)
