"""The blocks in which torch computes the convolution, and the matrices that it takes.

A block is some chunks of a group of sequences, enough for matrix products to be worth the calls;
the room that a block takes does not grow with the length. A batch goes in groups of rows, a packed
row sequence by sequence. The last tokens of a sequence are a block of one smaller chunk.

Legend: columns [H, B, K, V, T], time innermost; states [H, B, K, V, chunks, M], complex.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from supra.kernels.chunks import Group, split_groups
from supra.kernels.long_conv.inputs import Inputs
from supra.kernels.long_conv.modes import (
    Matrices,
    Model,
    d_model,
    d_toeplitz,
    matrices,
    toeplitz,
    transition,
    wide,
)

BLOCK = 1 << 23  # numbers in the columns of a block, at the most: 32 MiB in float32
PIECE = 128  # tokens that are transposed at a time, which a cache holds


def split_rows(x: Inputs, columns: int, size: int) -> list[Group]:
    """Groups, each small enough for a block to hold a chunk. columns: K * V of all heads."""
    return split_groups(x.value, x.cu_seqlens, max(1, BLOCK // (columns * size)))


def split_blocks(group: Group, filters: "Filters", columns: int) -> Iterator["Block"]:
    size, rows = filters.size, group.rows.stop - group.rows.start
    chunks = (group.end - group.begin) // size
    full = group.begin + chunks * size
    count = -(-chunks // max(1, BLOCK // (rows * columns * size)))  # of blocks of equal sizes
    step = -(-chunks // max(1, count)) * size
    for at in range(group.begin, full, max(1, step)):
        yield Block(group.rows, at, min(at + step, full), filters[size])
    if full < group.end:
        yield Block(group.rows, full, group.end, filters[group.end - full])


class Block:
    """Tokens begin to end of some rows, in chunks that one filter takes."""

    def __init__(self, rows: slice, begin: int, end: int, filter: "Filter"):
        self.rows, self.tokens, self.filter = rows, slice(begin, end), filter
        self.dtype = filter.toeplitz.dtype

    def outer(self, left: Tensor | None, right: Tensor) -> Tensor:
        """Products of two tensors [B, T, H, D] as columns [H, B, K, V, T]; None is ones."""
        right = self._part(right)
        if left is None:
            return self._columns(right)[:, :, None]
        left = self._part(left)
        if left.shape[3] == 1:  # one multiplication less to transpose
            return self._columns(right, left)[:, :, None]
        return self._columns(left)[:, :, :, None] * self._columns(right)[:, :, None]

    def contract(self, columns: Tensor, by: Tensor | None, dim: int, out: Tensor) -> None:
        """Multiply columns [H, B, K, V, T] by [B, T, H, D], sum over dim, 2 (K) or 3 (V).

        The sums go into out [B, T, H, D].
        """
        out, by = self._part(out), None if by is None else self._part(by)
        if columns.shape[dim] > 1:
            columns, by = (columns * self._columns(by).unsqueeze(5 - dim)).sum(dim), None
        else:
            columns = columns.squeeze(dim)
        for b, at in self._pieces(out):
            piece = columns[:, b, :, at].contiguous().permute(2, 0, 1)
            if by is None:
                out[b, at] = piece
            elif out.dtype == self.dtype:
                torch.mul(piece, by[b, at], out=out[b, at])
            else:
                out[b, at] = piece * by[b, at]

    def states(self, columns: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """States that the chunks enter with, [H, B, K, V, chunks, M], and the one after the block.

        memory: the state before the block, [H, B, K, V, M].
        """
        steps = self._complex(torch.bmm(self._rows(columns), self.filter.write), columns)
        return steps, self._scan(steps, memory, self.filter.whole)

    def read(self, columns: Tensor, states: Tensor) -> Tensor:
        """The convolution of the columns, given the states that the chunks enter with."""
        found = torch.bmm(self._rows(columns), self.filter.toeplitz)
        return found.baddbmm_(self._real(states), self.filter.read).view(columns.shape)

    def convolve(self, columns: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        states, memory = self.states(columns, memory)
        return self.read(columns, states), memory

    def d_convolve(
        self, columns: Tensor, states: Tensor, d_found: Tensor, d_memory: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the columns and of the state before the block; the filter keeps its own.

        d_memory: of the state after the block.
        """
        filter = self.filter
        inputs, d_rows, entering = self._rows(columns), self._rows(d_found), self._real(states)
        steps = self._complex(torch.bmm(d_rows, filter.read.mT), columns)
        whole = filter.whole.conj_physical()
        d_memory = self._scan(steps, d_memory, whole, back=True)
        leaving = self._real(steps)
        filter.add(
            toeplitz=torch.bmm(inputs.mT, d_rows),
            read=torch.bmm(d_rows.mT, entering),
            write=torch.bmm(inputs.mT, leaving),
        )
        filter.add(whole=states.conj_physical_().mul_(steps).sum((1, 2, 3, 4)))
        d_columns = torch.bmm(d_rows, filter.toeplitz.mT)
        d_columns.baddbmm_(leaving, filter.write.mT)
        return d_columns.view(columns.shape), d_memory

    def _part(self, x: Tensor) -> Tensor:
        return x[self.rows, self.tokens]

    def _pieces(self, x: Tensor) -> Iterator[tuple[int, slice]]:
        for b in range(x.shape[0]):
            for at in range(0, x.shape[1], PIECE):
                yield b, slice(at, at + PIECE)

    def _columns(self, x: Tensor, by: Tensor | None = None) -> Tensor:
        """[B, T, H, D], times `by` if it is given -> [H, B, D, T]"""
        batch, length, heads, width = x.shape
        out = x.new_empty(heads, batch, width, length, dtype=self.dtype)
        for b, at in self._pieces(x):
            piece = x[b, at].to(self.dtype)
            piece = piece if by is None else piece * by[b, at]
            out[:, b, :, at] = piece.permute(1, 2, 0)
        return out

    def _rows(self, columns: Tensor) -> Tensor:
        """[H, B, K, V, T] -> [H, B * K * V * chunks, n]"""
        return columns.reshape(len(columns), -1, self.filter.size)

    def _real(self, states: Tensor) -> Tensor:
        """[H, B, K, V, chunks, M], complex -> [H, B * K * V * chunks, 2 * M]"""
        return torch.view_as_real(states).view(len(states), -1, 2 * states.shape[-1])

    def _complex(self, rows: Tensor, columns: Tensor) -> Tensor:
        chunks = columns.shape[4] // self.filter.size
        return torch.view_as_complex(rows.view(*columns.shape[:4], chunks, -1, 2))

    @staticmethod
    def _scan(steps: Tensor, memory: Tensor, whole: Tensor, back: bool = False) -> Tensor:
        """Take a state through the steps of its chunks; each is replaced by the state before it."""
        count = steps.shape[4]
        for i in reversed(range(count)) if back else range(count):
            step = steps[:, :, :, :, i]
            after = torch.mul(memory, whole).add_(step)
            step.copy_(memory)
            memory = after
        return memory


def lanes_of(state: Tensor) -> Tensor:
    """[N, H, M, 2, K, V] -> complex [H, N, K, V, M], in float64 from chunk to chunk."""
    return torch.view_as_complex(wide(state.permute(1, 0, 4, 5, 2, 3)).contiguous())


def state_of(lanes: Tensor) -> Tensor:
    return torch.view_as_real(lanes).permute(1, 0, 4, 5, 2, 3)


class Filter:
    """The model as matrices for chunks of n tokens, and their gradients, which add up."""

    def __init__(self, model: Model, found: Matrices, size: int):
        self.size = size
        self.toeplitz = toeplitz(found.taps[:, :size])  # [H, n, n], the input's time first
        self.write = found.write[:, -size:].flatten(2)
        self.read = found.read[:, :size].flatten(2).mT
        self.whole = transition(model, size)[:, None, None, None]
        self.gradients: dict[str, Tensor] = {}

    def add(self, **gradients: Tensor) -> None:
        for name, x in gradients.items():
            if name in self.gradients:
                self.gradients[name] += x
            else:
                self.gradients[name] = x


class Filters:
    """The filters for chunks of every size up to `size`, each made when it is asked for."""

    def __init__(self, model: Model, size: int):
        self.model, self.size = model, size
        self.matrices = matrices(self.model, size)
        self.made: dict[int, Filter] = {}

    def __getitem__(self, size: int) -> Filter:
        if size not in self.made:
            self.made[size] = Filter(self.model, self.matrices, size)
        return self.made[size]

    def gradients(self) -> Model:
        """Gradients of the model."""
        total = Matrices(*map(torch.zeros_like, self.matrices))
        for n, made in self.made.items():
            total.taps[:, :n] += d_toeplitz(made.gradients["toeplitz"])
            total.read[:, :n] += made.gradients["read"].view_as(total.read[:, :n])
            total.write[:, -n:] += made.gradients["write"].view_as(total.write[:, -n:])
        whole = ((n, made.gradients["whole"]) for n, made in self.made.items())
        return d_model(self.model, total, whole)
