"""The loop of the oracles: one token after the other, in float64."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from supra.kernels import checks


def run(
    step: Callable[..., tuple[Tensor, ...]],
    tokens: Tensor,
    cu_seqlens: Tensor | None,
    *state: Tensor,
) -> tuple[Tensor, ...]:
    """Outputs [B, T, ...] and the parts of the final state, [N, ...] each.

    step: takes the place of a token in the flattened [B * T] tokens and the parts of the state
        before it, and returns the token's output and the parts of the state after it.
    tokens: [B, T, ...]. state: the parts of the initial state, [N, ...] each.
    """
    batch, length = tokens.shape[:2]
    outputs, ends = [], []
    for n, (begin, end) in enumerate(pairwise(checks.bounds(cu_seqlens, batch, length))):
        parts = [part[n].double() for part in state]
        for t in range(begin, end):
            output, *parts = step(t, *parts)
            outputs.append(output)
        ends.append(parts)
    output = torch.stack(outputs).unflatten(0, (batch, length))
    return output, *map(torch.stack, zip(*ends, strict=True))


def flat(*tensors: Tensor) -> list[Tensor]:
    """[B, T, ...] -> [B * T, ...] in float64."""
    return [x.double().flatten(0, 1) for x in tensors]


def decay_by_token(log_decay: Tensor | None, tokens: Tensor, heads: int) -> Tensor:
    """exp(log_decay) of None, [H] or [B, T, H] as [B * T, H]; tokens [B, T, ...]."""
    decay = torch.ones((), dtype=torch.float64, device=tokens.device)
    decay = decay if log_decay is None else log_decay.double().exp()
    return decay.expand(*tokens.shape[:2], heads).flatten(0, 1)
