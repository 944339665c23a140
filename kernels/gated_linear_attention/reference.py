"""The oracle: the recurrence as it is written in api.py, one token after the other, in float64."""

import torch
from torch import Tensor


def recurrence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    bonus: Tensor | None,
    state: Tensor | None,
    *,
    bounds: list[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output [B, T, Hq, V] and final state, all float64.

    state: before the first token, None for zeros; one per sequence.
    bounds: first token of every sequence in the flattened [B * T] tokens, and the end.
    """
    batch, length, heads = query.shape[:3]
    kv_heads, group = key.shape[2], heads // key.shape[2]
    if state is None:
        state = query.new_zeros(len(bounds) - 1, kv_heads, key.shape[3], value.shape[3])
    query, key, value, log_decay = (
        x.double().flatten(0, 1) for x in (query, key, value, log_decay)
    )
    decay = log_decay.exp()

    def read(q: Tensor, memory: Tensor) -> Tensor:
        return scale * torch.einsum("hk,hkv->hv", q, memory.repeat_interleave(group, 0))

    outputs, ends = [], []
    for n in range(len(bounds) - 1):
        memory = state[n].double()
        for t in range(bounds[n], bounds[n + 1]):
            new = key[t, :, :, None] * value[t, :, None, :]
            before, memory = memory, decay[t, :, :, None] * memory + new
            if bonus is None:
                outputs.append(read(query[t], memory))
            else:
                outputs.append(read(query[t], before) + read(query[t] * bonus.double(), new))
        ends.append(memory)
    return torch.stack(outputs).unflatten(0, (batch, length)), torch.stack(ends)
