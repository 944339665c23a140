"""The delta rule in plain torch: token by token, and in chunks, whose states are scanned.

A token writes beta e, where e is the error, what the state lacks of its value. In a chunk,

    e = T v - W S,    T = (1 + B)^-1,    W = T (keys with the decay up to them)

S is the state before the chunk, and B_ij, below the diagonal, is what key i reads of key j, times
beta_j: the WY form (Yang et al. 2024) with the strengths on the side of the columns. The scores of
the queries have them as well, so that all else is said of the errors.

Legend: rows = chunks * Hkv of a block, in the order of Layout.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from supra.kernels import checks
from supra.kernels.chunks import Block
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


def recurrent(x: Inputs, in_place: bool) -> tuple[Tensor, Tensor]:
    """Output and final state of the recurrence, token by token; a lane is a head of a sequence."""
    log_decay = x.log_decay
    if log_decay is not None and log_decay.dim() == 1:
        log_decay = log_decay.expand(x.beta.shape)
    state = checks.given_or_zeros(x.state, x)
    memory, dtype, (batch, length) = state.flatten(0, 1), state.dtype, x.query.shape[:2]
    lanes = memory.shape[0]  # len() would be a constant of an exported step

    def steps(y: Tensor, width: int) -> Iterable[Tensor]:
        """[B, T, ...] as T tensors [lanes, ..., width]; to decode one token is one view of it."""
        y = y if y.dtype == dtype else y.to(dtype)
        if length == 1:
            return (y.reshape(lanes, -1, width),)
        return y.transpose(0, 1).reshape(length, lanes, -1, width).unbind()

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
    """Tiles that chunks.forward() takes; the operation sets what is declared here.

    The scores of the queries have the decay between the tokens, and beta.
    """

    block: Block
    value: Tensor  # [rows, C, V]
    writing: Tensor  # beta times keys with the decay to the end of their chunk, [rows, C, K]
    whole: Tensor  # decay of a chunk: [rows, 1, 1], or [rows, K, 1] per channel of the keys

    def solve(self, overlap: Tensor, entering: Tensor) -> None:
        """Set inverse = T and reading = W.

        overlap: B [rows, C, C], read below the diagonal alone. entering: keys with the decay since
        the chunk began, [rows, C, K].
        """
        # T (1 + B) = 1 takes 0.57 ms, (1 + B) T = 1 0.87, and doubled powers of B 2.6 (512 tiles of
        # 32 x 32, one core)
        identity = torch.eye(overlap.shape[-1], dtype=overlap.dtype, device=overlap.device)
        self.inverse = torch.linalg.solve_triangular(
            overlap, identity.expand_as(overlap), upper=False, left=False, unitriangular=True
        )
        self.reading = torch.bmm(self.inverse, entering)

    def scan(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """States before every chunk [rows, K, V], and errors [rows, C, V].

        state: [N * Hkv, K, V] in the order of ranks, is taken through the chunks.
        """
        errors = torch.bmm(self.inverse, self.value)
        states = errors.new_empty(len(errors), *state.shape[1:])
        tensors = states, errors, self.reading, self.whole, self.writing.mT
        for now, before, error, read, whole, write in self.block.walk(state, *tensors):
            before.copy_(now)
            error.baddbmm_(read, now, alpha=-1)
            now.mul_(whole).baddbmm_(write, error)
        return states, errors

    def backward(
        self, d_out: Tensor, states: Tensor, errors: Tensor, d_state: Tensor
    ) -> list[Tensor]:
        """Gradients of the inputs from those of the outputs and of the state.

        From de follow dv = T^T de, dB = -dv e^T and d(keys with the decay up to them) = -dv S^T.
        """
        d_errors = torch.bmm(self.scores.mT, d_out)
        d_states = self.scan_back(d_errors, torch.bmm(self.entering_query.mT, d_out), d_state)
        d_value = torch.bmm(self.inverse.mT, d_errors)
        return self.gradients(d_out, d_value, errors, states, d_states)

    def scan_back(self, d_errors: Tensor, steps: Tensor, d_state: Tensor) -> Tensor:
        """Gradients of the states after every chunk [rows, K, V].

        steps: what the outputs of a chunk give to the state before it. d_errors [rows, C, V], the
        gradient of the errors from the outputs, is completed in place; d_state [N * Hkv, K, V] is
        taken back through the chunks.
        """
        d_states = torch.empty_like(steps)
        tensors = d_states, d_errors, self.writing, self.whole, steps, self.reading.mT
        for now, after, error, write, whole, step, read in reversed(
            self.block.walk(d_state, *tensors)
        ):
            after.copy_(now)
            error.baddbmm_(write, now)
            torch.addcmul(step, now, whole, out=now).baddbmm_(read, error, alpha=-1)
        return d_states
