"""The oracle: the recurrence as it is written in api.py, one token after the other, in float64."""

import torch
from torch import Tensor


def recurrence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    weight: Tensor,
    state: Tensor | None,
    *,
    bounds: list[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output [B, T, H, V] and final state, all float64.

    state: before the first token, None for zeros; one per sequence.
    bounds: first token of every sequence in the flattened [B * T] tokens, and the end.
    """
    batch, length = query.shape[:2]
    weight = weight.double()
    if state is None:
        state = query.new_zeros(len(bounds) - 1, *weight.shape)
    query, key, value, log_decay = (
        x.double().flatten(0, 1) for x in (query, key, value, log_decay)
    )
    keep, write = log_decay.exp()[..., None, None], -torch.expm1(log_decay)[..., None, None]
    outputs, ends = [], []
    for n in range(len(bounds) - 1):
        memory = state[n].double()
        for t in range(bounds[n], bounds[n + 1]):
            written = key[t, :, :, None] * value[t, :, None, :]
            memory = keep[t] * memory + write[t] * (weight * memory + written).tanh()
            outputs.append(scale * torch.einsum("hk,hkv->hv", query[t], memory))
        ends.append(memory)
    return torch.stack(outputs).unflatten(0, (batch, length)), torch.stack(ends)
