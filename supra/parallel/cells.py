"""Nonlinear recurrent cells: one step from a state and a token's input, and the step's Jacobian.

A cell computes the steps of many tokens at once, from states [N, …]. This makes Newton's method
parallel.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from supra.errors import UserError
from supra.parallel.scan import Structure

Drive = tuple[Tensor, ...]  # a step's inputs from its token, [N, …] or [B, T, …]


class Cell(nn.Module, ABC):
    """s_t = step(s_{t−1}, drive_t), where drive = project(inputs) is computed for all tokens at
    once.

    structure: the form of the Jacobian.
    few_numbers: up to this many elements in a batch's states, "auto" takes DEER on a CPU. 0 for a
        cell that was not measured, or whose step is so cheap that a loop is faster.
    """

    # few_numbers was measured with one thread and 256 to 8192 tokens (supra bench parallel). DEER
    # is 1.8 to 2.3 times as fast as the loop for ParaGRU at 128 elements and 0.9 to 1.4 times at
    # 256; for NonlinearGated 1.2 to 1.5 times at 121 and 0.4 to 0.9 times at 256; for ParaLSTM 1.2
    # to 1.6 times at 128 and 0.6 times at 512; for GRU 1.6 to 2.5 times at 16 and below 0.8 times
    # at 32; for LSTM 1.4 to 1.9 times at 24 and 0.7 to 1.2 times at 32.
    structure: ClassVar[Structure] = Structure.DENSE
    few_numbers: ClassVar[int] = 0

    def contracts(self) -> bool:
        """Whether Newton's method should converge in a few sweeps, judging by the weights."""
        return True

    def project(self, inputs: Tensor) -> Drive:
        """The part of a step that does not depend on the state: tensors [B, T, …] from inputs
        [B, T, …]."""
        return (inputs,)

    @abstractmethod
    def empty_state(self, drive: Drive) -> Tensor:
        """Zeros [B, …]: the state before the first token."""

    @abstractmethod
    def step(self, state: Tensor, drive: Drive) -> Tensor:
        """The next state [N, …]."""

    def linearise(self, state: Tensor, drive: Drive) -> tuple[Tensor, Tensor]:
        """The next state, and its Jacobian with respect to `state`, in the form of `structure`.

        This version differentiates in forward mode: one pass for every element of a token's state
        (Structure.DENSE), or of a channel's state. Cells with a known formula override it.
        """
        width = 1 if self.structure is Structure.DIAGONAL else state.shape[-1]
        columns = []
        for column in range(width):
            tangent = torch.ones_like(state)
            if width > 1:
                tangent = torch.zeros_like(state)
                tangent[..., column] = 1
            value, moved = torch.func.jvp(lambda x: self.step(x, drive), (state,), (tangent,))
            columns.append(moved)
        return value, moved if width == 1 else torch.stack(columns, dim=-1)

    def jacobian_product(self, state: Tensor, drive: Drive, tangent: Tensor):
        """The next state, and the Jacobian times a tangent [N, …]."""
        return torch.func.jvp(lambda x: self.step(x, drive), (state,), (tangent,))


class FunctionCell(Cell):
    """A cell from any differentiable function of states [N, D] and inputs [N, …]. width: D."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], width: int):
        super().__init__()
        self.function, self.width = function, width

    def empty_state(self, drive: Drive) -> Tensor:
        return drive[0].new_zeros(len(drive[0]), self.width)

    def step(self, state: Tensor, drive: Drive) -> Tensor:
        return self.function(state, *drive)


class GRU(Cell):
    """A GRU with the formula and parameters of torch.nn.GRUCell (Cho et al. 2014)."""

    few_numbers = 16

    def __init__(self, input_size: int, width: int):
        super().__init__()
        self.width = width
        self.input = nn.Linear(input_size, 3 * width)
        self.hidden = nn.Linear(width, 3 * width)
        _as_torch_does(self, width)

    def project(self, inputs: Tensor) -> Drive:
        return (self.input(inputs),)

    def empty_state(self, drive: Drive) -> Tensor:
        return drive[0].new_zeros(len(drive[0]), self.width)

    def step(self, state: Tensor, drive: Drive) -> Tensor:
        _, update, candidate, _ = self._gates(state, drive)
        return candidate + update * (state - candidate)

    def linearise(self, state: Tensor, drive: Drive) -> tuple[Tensor, Tensor]:
        reset, update, candidate, hidden = self._gates(state, drive)
        of_reset, of_update, of_candidate = self.hidden.weight.chunk(3)
        slope = (1 - update) * (1 - candidate.square())
        jacobian = ((state - candidate) * update * (1 - update))[..., None] * of_update
        jacobian = jacobian + (slope * reset)[..., None] * of_candidate
        jacobian = jacobian + (slope * hidden * reset * (1 - reset))[..., None] * of_reset
        jacobian = jacobian + torch.diag_embed(update)
        return candidate + update * (state - candidate), jacobian

    def _gates(self, state: Tensor, drive: Drive) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        reset, update, candidate = drive[0].chunk(3, dim=-1)
        of_reset, of_update, hidden = self.hidden(state).chunk(3, dim=-1)
        reset, update = (reset + of_reset).sigmoid(), (update + of_update).sigmoid()
        return reset, update, (candidate + reset * hidden).tanh(), hidden


class LSTM(Cell):
    """An LSTM with the formula and parameters of torch.nn.LSTMCell (Hochreiter & Schmidhuber 1997).

    The state is the cell state followed by the hidden state, [N, 2 D].
    """

    few_numbers = 24

    def __init__(self, input_size: int, width: int):
        super().__init__()
        self.width = width
        self.input = nn.Linear(input_size, 4 * width)
        self.hidden = nn.Linear(width, 4 * width)
        _as_torch_does(self, width)

    def project(self, inputs: Tensor) -> Drive:
        return (self.input(inputs),)

    def empty_state(self, drive: Drive) -> Tensor:
        return drive[0].new_zeros(len(drive[0]), 2 * self.width)

    def step(self, state: Tensor, drive: Drive) -> Tensor:
        return self._parts(state, drive)[0]

    def linearise(self, state: Tensor, drive: Drive) -> tuple[Tensor, Tensor]:
        after, (i, f, candidate, o), c, new = self._parts(state, drive)
        of_i, of_f, of_candidate, of_o = self.hidden.weight.chunk(4)
        by_hidden = (candidate * i * (1 - i))[..., None] * of_i
        by_hidden = by_hidden + (c * f * (1 - f))[..., None] * of_f
        by_hidden = by_hidden + (i * (1 - candidate.square()))[..., None] * of_candidate
        bent = new.tanh()
        slope = o * (1 - bent.square())
        top = torch.cat([torch.diag_embed(f), by_hidden], dim=-1)
        below = slope[..., None] * top
        below[..., self.width :] += (bent * o * (1 - o))[..., None] * of_o
        return after, torch.cat([top, below], dim=-2)

    def _parts(self, state: Tensor, drive: Drive):
        c, h = state.chunk(2, dim=-1)
        i, f, candidate, o = (drive[0] + self.hidden(h)).chunk(4, dim=-1)
        i, f, candidate, o = i.sigmoid(), f.sigmoid(), candidate.tanh(), o.sigmoid()
        new = f * c + i * candidate
        return torch.cat([new, o * new.tanh()], dim=-1), (i, f, candidate, o), c, new


class ParaGRU(Cell):
    """A GRU with diagonal recurrent matrices (ParaRNN, Danieli et al. 2025).

    largest: the largest absolute recurrent weight. Above about 0.5, Newton's method needs more than
        a few sweeps; above 1 it may not converge.
    """

    structure = Structure.DIAGONAL
    few_numbers = 128

    def __init__(self, input_size: int, width: int, largest: float = 0.5):
        super().__init__()
        self.width, self.largest = width, largest
        self.input = nn.Linear(input_size, 3 * width)
        self.weight = nn.Parameter(torch.randn(3, width) * 0.4 / math.sqrt(5))

    def contracts(self) -> bool:
        return self.largest <= 1

    def project(self, inputs: Tensor) -> Drive:
        return (self.input(inputs),)

    def empty_state(self, drive: Drive) -> Tensor:
        return drive[0].new_zeros(len(drive[0]), self.width)

    def step(self, state: Tensor, drive: Drive) -> Tensor:
        update, _, candidate, _ = self._gates(state, drive)
        return state + update * (candidate - state)

    def linearise(self, state: Tensor, drive: Drive) -> tuple[Tensor, Tensor]:
        update, reset, candidate, (a_update, a_reset, a) = self._gates(state, drive)
        jacobian = 1 - update + (candidate - state) * update * (1 - update) * a_update
        inner = reset + state * reset * (1 - reset) * a_reset
        jacobian = jacobian + update * (1 - candidate.square()) * a * inner
        return state + update * (candidate - state), jacobian

    def _gates(self, state: Tensor, drive: Drive):
        weights = self.weight.clamp(-self.largest, self.largest).unbind()
        update, reset, candidate = drive[0].chunk(3, dim=-1)
        update = (update + weights[0] * state).sigmoid()
        reset = (reset + weights[1] * state).sigmoid()
        return update, reset, (candidate + weights[2] * state * reset).tanh(), weights


class ParaLSTM(Cell):
    """An LSTM with diagonal recurrent matrices, peepholes and i = 1 − f (ParaRNN, as above).

    The state is [N, D, 2]: the cell state and the hidden state of each channel.
    """

    structure = Structure.BLOCK
    few_numbers = 128

    def __init__(self, input_size: int, width: int, largest: float = 0.5):
        super().__init__()
        self.width, self.largest = width, largest
        self.input = nn.Linear(input_size, 3 * width)
        self.weight = nn.Parameter(torch.randn(3, width) * 0.4 / math.sqrt(5))
        self.peephole = nn.Parameter(torch.randn(2, width) * 0.4 / math.sqrt(5))

    def contracts(self) -> bool:
        return self.largest <= 1

    def project(self, inputs: Tensor) -> Drive:
        return (self.input(inputs),)

    def empty_state(self, drive: Drive) -> Tensor:
        return drive[0].new_zeros(len(drive[0]), self.width, 2)

    def step(self, state: Tensor, drive: Drive) -> Tensor:
        return self._parts(state, drive)[0]

    def linearise(self, state: Tensor, drive: Drive) -> tuple[Tensor, Tensor]:
        after, f, candidate, o, (a_f, a_c, a_o), (p_f, p_o) = self._parts(state, drive)
        c, bent = state[..., 0], after[..., 0].tanh()
        slope = f * (1 - f) * (c - candidate)
        cc = f + slope * p_f
        ch = slope * a_f + (1 - f) * (1 - candidate.square()) * a_c
        gate = bent * o * (1 - o)
        through = o * (1 - bent.square()) + gate * p_o
        rows = torch.stack([cc, ch], -1), torch.stack([through * cc, gate * a_o + through * ch], -1)
        return after, torch.stack(rows, dim=-2)

    def _parts(self, state: Tensor, drive: Drive):
        weights = self.weight.clamp(-self.largest, self.largest).unbind()
        peepholes = self.peephole.clamp(-self.largest, self.largest).unbind()
        c, h = state.unbind(-1)
        f, candidate, o = drive[0].chunk(3, dim=-1)
        f = (f + weights[0] * h + peepholes[0] * c).sigmoid()
        candidate = (candidate + weights[1] * h).tanh()
        new = f * c + (1 - f) * candidate
        o = (o + weights[2] * h + peepholes[1] * new).sigmoid()
        return torch.stack([new, o * new.tanh()], -1), f, candidate, o, weights, peepholes


class NonlinearGated(Cell):
    """S' = f S + (1 − f) tanh(a ∘ S + k vᵀ) with states [N, H, K, V].

    With a = 0 and small k vᵀ, this is gated linear attention. With |a| < 1 it contracts, because
    |∂S'/∂S| <= f + (1 − f) |a| < 1. With |a| > 1 an element can have two resting points, which it
    needs to count (parity), and Newton's method may diverge.

    weight: a, [H, K, V] or broadcastable to it; a parameter, or computed from parameters.
    """

    structure = Structure.DIAGONAL
    few_numbers = 128

    def __init__(self, weight: Tensor):
        super().__init__()
        if isinstance(weight, nn.Parameter):
            self.weight = weight
        else:
            self.register_buffer("weight", weight, persistent=False)

    def contracts(self) -> bool:
        return self.weight.abs().amax().item() <= 1

    def project(self, inputs: tuple[Tensor, ...]) -> Drive:
        """Takes key [B, T, H, K], value [B, T, H, V] and log_decay [B, T, H], the log of f. For
        packed documents also bool [B, T], true at the first token of each document."""
        key, value, log_decay, *first = inputs
        if key.shape[:3] != value.shape[:3] or log_decay.shape != key.shape[:3]:
            raise UserError(
                f"key {tuple(key.shape)}, value {tuple(value.shape)} and log_decay "
                f"{tuple(log_decay.shape)} must have the same B, T and H"
            )
        drive = key[..., None] * value[..., None, :], log_decay[..., None, None]
        return (*drive, *(~x[..., None, None, None] for x in first))

    def empty_state(self, drive: Drive) -> Tensor:
        return torch.zeros_like(drive[0][:, 0])

    def step(self, state: Tensor, drive: Drive) -> Tensor:
        return self._parts(state, drive)[0]

    def linearise(self, state: Tensor, drive: Drive) -> tuple[Tensor, Tensor]:
        after, new = self._parts(state, drive)
        keep, write = _keep_and_write(drive[1])
        slope = keep + write * (1 - new.square()) * self.weight
        return after, slope * drive[2] if len(drive) > 2 else slope

    def linear_solution(self, drive: Drive) -> tuple[Tensor, Tensor]:
        """Matrix and bias of the same recurrence with a = 0, the first guess of Newton's method."""
        written, log_decay, *connected = drive
        keep, write = _keep_and_write(log_decay)
        keep = keep.expand_as(written)
        return keep * connected[0] if connected else keep, write * written.tanh()

    def _parts(self, state: Tensor, drive: Drive) -> tuple[Tensor, Tensor]:
        """The next state and its tanh."""
        written, log_decay, *connected = drive
        state = state * connected[0] if connected else state
        keep, write = _keep_and_write(log_decay)
        new = (self.weight * state + written).tanh()
        return keep * state + write * new, new


def _keep_and_write(log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """f and 1 − f; the latter is exact also if f is close to 1."""
    return log_decay.exp(), -torch.expm1(log_decay)


def _as_torch_does(cell: nn.Module, width: int) -> None:
    bound = 1 / math.sqrt(width)
    for parameter in cell.parameters():
        nn.init.uniform_(parameter, -bound, bound)
