"""The oracle: the recurrence as it is written in api.py, one token after the other, in float64."""

import torch
from torch import Tensor


def recurrence(
    query: Tensor | None,
    key: Tensor | None,
    value: Tensor,
    log_decay: Tensor,
    frequency: Tensor,
    weight: Tensor,
    skip: Tensor | None,
    state: Tensor | None,
    *,
    bounds: list[int],
) -> tuple[Tensor, Tensor]:
    """Output [B, T, H, V] and final state [N, H, M, 2, K, V], all float64.

    state: before the first token, None for zeros; one per sequence.
    bounds: first token of every sequence in the flattened [B * T] tokens, and the end.
    """
    batch, length, heads = value.shape[:3]
    gate = value.new_ones(batch, length, heads, 1)
    query, key, value = (
        (gate if x is None else x).double().flatten(0, 1) for x in (query, key, value)
    )
    decay = torch.polar(log_decay.double().exp(), frequency.double())[..., None, None]
    weight = torch.view_as_complex(weight.double().contiguous())[..., None, None]
    if state is None:
        shape = (len(bounds) - 1, heads, log_decay.shape[1], 2, key.shape[2], value.shape[2])
        state = value.new_zeros(shape)
    outputs, ends = [], []
    for n in range(len(bounds) - 1):
        memory = torch.view_as_complex(state[n].double().movedim(2, -1).contiguous())
        for t in range(bounds[n], bounds[n + 1]):
            new = key[t, :, :, None] * value[t, :, None, :]
            memory = decay * memory + new[:, None]
            seen = 2 * (weight * memory).real.sum(1)
            if skip is not None:
                seen = seen + skip.double()[:, None, None] * new
            outputs.append((query[t, :, :, None] * seen).sum(1))
        ends.append(torch.view_as_real(memory).movedim(-1, 2))
    return torch.stack(outputs).unflatten(0, (batch, length)), torch.stack(ends)
