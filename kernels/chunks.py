"""How sequences are cut into chunks, in plain torch."""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from supra.kernels import checks


def count_chunks(
    x: Tensor, cu_seqlens: Tensor | None, chunk_size: int, rows_before: int = 0
) -> int:
    """Chunks of all sequences in x [B, T, ...]; of packed ones an upper bound, without a look.

    rows_before: what every sequence has in front of its tokens.
    """
    batch, length = x.shape[:2]
    if cu_seqlens is None:
        return batch * -(-(length + rows_before) // chunk_size)
    count = len(cu_seqlens) - 1
    return (length + count * rows_before) // chunk_size + count


class Group(NamedTuple):
    """Sequences of one length that go together: rows of a batch, or one of a packed row."""

    rows: slice
    begin: int
    end: int
    states: slice


def split_groups(x: Tensor, cu_seqlens: Tensor | None, most: int) -> list[Group]:
    """Groups of at most `most` rows of x [B, T, ...]; empty sequences are in none."""
    batch, length = x.shape[:2]
    bounds = checks.bounds(cu_seqlens, batch, length)
    if cu_seqlens is not None:
        spans = enumerate(pairwise(bounds))
        return [
            Group(slice(0, 1), *span, slice(n, n + 1)) for n, span in spans if span[0] < span[1]
        ]
    slices = [slice(at, min(at + most, batch)) for at in range(0, batch, most)]
    return [Group(rows, 0, length, rows) for rows in slices]


class Layout(NamedTuple):
    """Chunks of all sequences in one list, so that a packed row costs what a batch does.

    Sequences are sorted by their number of chunks, most first, and the list goes by level: the
    first chunk of every sequence, then the second of all that have one, and so on. The chunks of a
    level are then one slice, and so are the states that they read.
    """

    tokens: Tensor  # [chunks, C]: place in the flattened [B * T] tokens; any place where padded
    padded: Tensor | None  # [chunks, C]; None when every chunk is full
    levels: list[tuple[int, int]]  # slice of the chunks; its length is the number of states
    order: Tensor  # [N]: sequence of each rank
    place: Tensor  # [N]: rank of each sequence

    @staticmethod
    def of(x: Tensor, cu_seqlens: Tensor | None, chunk_size: int) -> "Layout":
        """For the sequences in x [B, T, ...]."""
        bounds, device = checks.bounds(cu_seqlens, *x.shape[:2]), x.device
        sizes = [end - begin for begin, end in pairwise(bounds)]
        size = min(chunk_size, max(sizes))
        chunks = [-(-n // size) for n in sizes]
        order = sorted(range(len(sizes)), key=lambda n: -chunks[n])
        starts, counts, levels = [], [], []
        for level in range(max(chunks)):
            active = [n for n in order if chunks[n] > level]
            levels.append((len(starts), len(starts) + len(active)))
            starts += [bounds[n] + level * size for n in active]
            counts += [min(size, sizes[n] - level * size) for n in active]
        starts, counts, order = (torch.tensor(x, device=device) for x in (starts, counts, order))
        column = torch.arange(size, device=device)
        padded = column >= counts[:, None]
        tokens = (starts[:, None] + column).clamp(max=bounds[-1] - 1)
        full = all(n % size == 0 for n in sizes)
        return Layout(tokens, None if full else padded, levels, order, order.argsort())

    def gather(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, T, H, D] -> tiles [chunks, H, C, D]; padded places hold some token."""
        rows = self._rows(x.shape[2])
        tiles = x.reshape(-1, x.shape[3]).index_select(0, rows.flatten())
        return tiles.view(*rows.shape, -1).to(dtype)

    def clear(self, tiles: Tensor) -> Tensor:
        """Zero the padded places of tiles in place."""
        if self.padded is None:
            return tiles
        return tiles.masked_fill_(self.padded[:, None, :, None], 0)

    def scatter(self, tiles: Tensor, like: Tensor) -> Tensor:
        """Tiles [chunks, H, C, D] -> [B, T, H, D], with B, T and H of `like` [B, T, H, ...]."""
        count, rows = like.shape[:3].numel(), self._rows(like.shape[2])
        if self.padded is not None:  # padded places go to a spare row at the end
            rows = rows.masked_fill(self.padded[:, None], count)
        out = tiles.new_empty(count + 1, tiles.shape[-1])
        out.index_copy_(0, rows.flatten(), tiles.reshape(-1, tiles.shape[-1]))
        return out[:-1].view(*like.shape[:3], -1)

    def _rows(self, heads: int) -> Tensor:
        """[chunks, H, C]: place of every tile row in the flattened [B * T * H] rows."""
        head = torch.arange(heads, device=self.tokens.device)[:, None]
        return self.tokens[:, None] * heads + head

    def decay_sums(self, log_decay: Tensor) -> Tensor:
        """Running sums of log_decay inside each chunk, [chunks, H, C]; constant where padded."""
        if log_decay.dim() == 1:
            log_decay = log_decay.expand(*self.tokens.shape, -1)
        else:
            log_decay = log_decay.flatten(0, 1)[self.tokens]
        if self.padded is not None:
            log_decay = log_decay.masked_fill(self.padded[..., None], 0)
        return log_decay.cumsum(1).transpose(1, 2).contiguous()
