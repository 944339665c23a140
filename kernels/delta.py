"""The delta rule in plain torch: token by token, and in chunks, whose states are scanned.

A token writes beta e, where e is the error, what the state lacks of its value. In a chunk,

    e = T v - W S,    T = (1 + A diag(beta))^-1,    W = T (keys with the decay up to them)

S is the state before the chunk, and A_ij is what key i reads of key j below the diagonal: the WY
form (Yang et al. 2024) with the strengths on the side of the columns.

Legend: rows = chunks * Hkv, in the order of Layout.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from supra.kernels import checks
from supra.kernels.chunks import Layout
from supra.kernels.operators import empty_head_results


class Inputs(NamedTuple):
    """What every backend of an operation with the delta rule takes, as its api.py describes it."""

    query: Tensor
    key: Tensor
    value: Tensor
    beta: Tensor
    log_decay: Tensor | None
    state: Tensor | None
    cu_seqlens: Tensor | None
    scale: float
    chunk_size: int
    backend: str

    empty_results = empty_head_results


def recurrent(x: Inputs, log_decay: Tensor | None, in_place: bool) -> tuple[Tensor, Tensor]:
    """Output [B, T, Hq, V] and final state of the recurrence, token by token.

    log_decay: None for no decay, [B, T, H], or [B, T, H, K]. A lane is one head of one sequence.
    """
    state = checks.given_or_zeros(x.state, x)
    memory, dtype, (batch, length) = state.flatten(0, 1), state.dtype, x.query.shape[:2]

    def steps(y: Tensor, width: int) -> Iterable[Tensor]:
        """[B, T, ...] as T tensors [lanes, ..., width]; to decode one token is one view of it."""
        y = y if y.dtype == dtype else y.to(dtype)
        if length == 1:
            return (y.reshape(len(memory), -1, width),)
        return y.transpose(0, 1).reshape(length, len(memory), -1, width).unbind()

    decays = [None] * length if log_decay is None else steps(log_decay.to(dtype).exp(), 1)
    tokens = (steps(y, y.shape[-1]) for y in x[:3])
    multiply, insert = (Tensor.mul_, Tensor.addcmul_) if in_place else (torch.mul, torch.addcmul)
    outputs = []
    for query, key, value, beta, decay in zip(*tokens, steps(x.beta, 1), decays, strict=True):
        if decay is not None:
            memory = multiply(memory, decay)
        error = torch.baddbmm(value, key, memory, alpha=-1)
        memory = insert(memory, key.mT, beta * error)
        # with beta=0 only the shape of the value is read; the scale costs no operator here
        output = torch.baddbmm(value, query, memory, beta=0, alpha=x.scale)
        outputs.append(output.view(batch, 1, *x.query.shape[2:3], -1))
    output = outputs[0] if length == 1 else torch.cat(outputs, 1)
    return output.to(x.value.dtype), state if in_place else memory.view_as(state)


class DeltaTiles:
    """Tiles of an operation with the delta rule, which sets what is declared here."""

    inputs: Inputs
    layout: Layout
    value: Tensor  # [rows, C, V]
    beta: Tensor  # [rows, C, 1], zero where padded
    whole: Tensor  # decay of a chunk: [rows, 1, 1], or [rows, K, 1] per channel of the keys
    departing: Tensor  # keys with the decay to the end of their chunk, [rows, C, K]

    def solve(self, overlap: Tensor, entering: Tensor) -> None:
        """Set inverse = T and reading = W.

        overlap: A [rows, C, C], read below the diagonal alone. entering: keys with the decay since
        the chunk began, [rows, C, K].
        """
        # T (1 + B) = 1 takes 2.7 ms where solving for v and exp(G) k takes 8.9, and their products
        # with T 3 (256 tiles of 64 x 64, one core); what is not below the diagonal of B is not read
        size = overlap.shape[-1]
        identity = torch.eye(size, dtype=overlap.dtype, device=overlap.device).expand_as(overlap)
        self.inverse = torch.linalg.solve_triangular(
            overlap * self.beta.mT, identity, upper=False, left=False, unitriangular=True
        )
        self.reading = self.inverse @ entering

    def scan(self) -> tuple[Tensor, Tensor, Tensor]:
        """States before every chunk [rows, K, V], errors [rows, C, V], and states after the last
        chunk of every sequence [N, Hkv, K, V].
        """
        errors, start = self.inverse @ self.value, self._ranked(self.inputs.state)
        states = errors.new_empty(len(errors), *start.shape[2:])
        end, writing = start.flatten(0, 1).clone(), self.beta * self.departing
        for at, count in self.slices():
            state = end[:count]
            states[at] = state
            errors[at].baddbmm_(self.reading[at], state, alpha=-1)
            state.mul_(self.whole[at]).baddbmm_(writing[at].mT, errors[at])
        return states, errors, end.view_as(start)

    def scan_back(
        self, d_written: Tensor, steps: Tensor, d_end: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the states after every chunk [rows, K, V], and of the first ones.

        steps: what the outputs of a chunk give to the state before it. d_written [rows, C, V], the
        gradient of beta e from the outputs, is completed in place.
        """
        d_end, reading = self._ranked(d_end), self.beta * self.reading
        d_states, d_start = torch.empty_like(steps), d_end.flatten(0, 1).clone()
        for at, count in reversed(self.slices()):
            d_state = d_start[:count]
            d_states[at] = d_state
            d_written[at].baddbmm_(self.departing[at], d_state)
            d_state.mul_(self.whole[at]).add_(steps[at])
            d_state.baddbmm_(reading[at].mT, d_written[at], alpha=-1)
        return d_states, d_start.view_as(d_end)

    def slices(self) -> list[tuple[slice, int]]:
        """Rows of every level, and how many states they read."""
        heads = self.inputs.key.shape[2]
        slices = [slice(begin * heads, end * heads) for begin, end in self.layout.levels]
        return [(x, x.stop - x.start) for x in slices]

    def _ranked(self, state: Tensor | None) -> Tensor:
        """The given state, or zeros, in the order of the layout."""
        return checks.given_or_zeros(state, self.inputs)[self.layout.order]
