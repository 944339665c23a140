"""The oracle: the recurrence as it is written in api.py, one token after the other, in float64."""

import torch
from torch import Tensor


def recurrence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    state: tuple[Tensor, Tensor | None],
    *,
    bounds: list[int],
    scale: float,
    eps: float,
) -> tuple[Tensor, tuple[Tensor, Tensor | None]]:
    """Output [B, T, Hq, V] and final state, all float64.

    bounds: first token of every sequence in the flattened [B * T] tokens, and the end; one state
    per sequence.
    """
    batch, length, heads = query.shape[:3]
    decay = torch.ones((), dtype=torch.float64, device=query.device)
    decay = decay if log_decay is None else log_decay.double().exp()
    decay = decay.expand(*query.shape[:2], state[0].shape[1]).flatten(0, 1)
    query, key, value = (x.double().flatten(0, 1) for x in (query, key, value))

    def per_query_head(x: Tensor) -> Tensor:
        return x.repeat_interleave(heads // x.shape[0], 0)

    def per_state_head(x: Tensor) -> Tensor:
        return x.repeat_interleave(state[0].shape[1] // x.shape[0], 0)

    outputs, memories, normalizers = [], [], []
    for n in range(len(bounds) - 1):
        memory = state[0][n].double()
        normalizer = None if state[1] is None else state[1][n].double()
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
    normalizer = None if state[1] is None else torch.stack(normalizers)
    return torch.stack(outputs).unflatten(0, (batch, length)), (memory, normalizer)
