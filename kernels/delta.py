"""The delta rule in chunks, in plain torch: what each token writes, and the scans over the states.

A token writes beta e, where e is the error, what the state lacks of its value. In a chunk,

    e = T v - W S,    T = (1 + A diag(beta))^-1,    W = T (keys with the decay up to them)

S is the state before the chunk, and A_ij is what key i reads of key j below the diagonal: the WY
form (Yang et al. 2024) with the strengths on the side of the columns.

Legend: rows = chunks * Hkv, in the order of Layout. Decay is per row, whole [rows, 1, 1], or per
channel of the keys, whole [rows, K, 1].
"""

import torch
from torch import Tensor

Levels = list[tuple[int, int]]  # slices of the rows


def inverse(overlap: Tensor, beta: Tensor) -> Tensor:
    """T [rows, C, C]; overlap: A, read below the diagonal alone; beta [rows, C, 1]."""
    # T (1 + B) = 1 takes 2.7 ms where solving for v and exp(G) k takes 8.9, and their products
    # with T 3 (256 tiles of 64 x 64, one core); what is not below the diagonal of B is not read
    size = overlap.shape[-1]
    identity = torch.eye(size, dtype=overlap.dtype, device=overlap.device).expand_as(overlap)
    return torch.linalg.solve_triangular(
        overlap * beta.mT, identity, upper=False, left=False, unitriangular=True
    )


def scan(
    levels: Levels, whole: Tensor, reading: Tensor, writing: Tensor, errors: Tensor, start: Tensor
) -> tuple[Tensor, Tensor]:
    """States before every chunk [rows, K, V], and after the last of every sequence [N, Hkv, K, V].

    reading: W [rows, C, K]. writing: keys times beta and the decay to the end of the chunk, as
    wide. errors: T v [rows, C, V], which become e in place.
    """
    states = errors.new_empty(len(errors), *start.shape[2:])
    end = start.flatten(0, 1).clone()
    for begin, stop in levels:
        at, state = slice(begin, stop), end[: stop - begin]
        states[at] = state
        errors[at].baddbmm_(reading[at], state, alpha=-1)
        state.mul_(whole[at]).baddbmm_(writing[at].mT, errors[at])
    return states, end.view_as(start)


def scan_back(
    levels: Levels,
    whole: Tensor,
    reading: Tensor,
    departing: Tensor,
    steps: Tensor,
    d_written: Tensor,
    d_end: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of the states after every chunk [rows, K, V], and of the first ones.

    reading: beta W. departing: keys times the decay to the end of the chunk. steps: what the
    outputs of a chunk give to the state before it. d_written [rows, C, V], the gradient of beta e
    from the outputs, is completed in place.
    """
    d_states, d_start = torch.empty_like(steps), d_end.flatten(0, 1).clone()
    for begin, stop in reversed(levels):
        at, d_state = slice(begin, stop), d_start[: stop - begin]
        d_states[at] = d_state
        d_written[at].baddbmm_(departing[at], d_state)
        d_state.mul_(whole[at]).add_(steps[at])
        d_state.baddbmm_(reading[at].mT, d_written[at], alpha=-1)
    return d_states, d_start.view_as(d_end)
