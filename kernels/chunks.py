"""How sequences are cut into chunks, and operations computed chunk by chunk, in plain torch."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from supra.kernels import checks

# Rows of a block, one for a token and key head: enough to be worth the calls, and few enough for
# what is computed to stay in the cache
BLOCK_ROWS = 4096


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


def decay_of(logs: Tensor, dtype: torch.dtype) -> Tensor:
    """exp of logs in the dtype, and exactly 0 below e^-80.

    So hardly a product with it is subnormal in float32. A CPU takes 100 times as long for those,
    and for exp where it gives one.
    """
    return F.threshold_(logs.to(dtype).clamp(min=-80.0).exp_(), 2e-35, 0.0)


def pairwise_decay(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """Running sums of logs [rows, C, 1] -> [rows, C, C], decay from column to row, lower triangle.

    The sums are float64: with resets among them float32 would keep 3e-5 of their differences.
    """
    if sums[:, -1].min() > -60.0:  # mostly; a product of powers takes a fifth of the time
        return (sums.exp().to(dtype) * sums.neg().exp_().to(dtype).mT).tril_()
    return decay_of((sums - sums.mT).to(dtype).tril_(), dtype).tril_()


def contiguous(x: Any) -> Any:
    """Inputs with the tensors that Block.gather() takes."""
    return x._replace(**{
        name: y.contiguous() for name, y in x._asdict().items() if isinstance(y, Tensor)
    })  # fmt: skip


class Layout(NamedTuple):
    """Chunks of all sequences in blocks, so that a packed row costs what a batch does.

    Sequences are sorted by their number of chunks, most first, and taken some at a time. Their
    chunks go by level: the first chunk of each, then the second of all that have one, and so on.
    The chunks of a level are then one slice, and so are the states that they read.
    """

    blocks: list["Block"]
    order: Tensor  # [N]: sequence of each rank
    place: Tensor  # [N]: rank of each sequence

    @staticmethod
    def of(x: Any, together: int | None = None) -> "Layout":
        """x: has query, key, cu_seqlens and chunk_size.

        together: for a recurrence that goes token by token. A chunk is then one token, and a block
        chunk_size tokens of so many sequences.
        """
        bounds = checks.bounds(x.cu_seqlens, *x.query.shape[:2])
        sizes = [end - begin for begin, end in pairwise(bounds)]
        size = 1 if together else min(x.chunk_size, max(sizes))
        order = sorted(range(len(sizes)), key=lambda n: -(-sizes[n] // size), reverse=True)
        most = together or -(-BLOCK_ROWS // (size * x.key.shape[2]))
        blocks = []
        for first in range(0, len(order), most):
            group = order[first : first + most]
            longest = max(sizes[n] for n in group)
            step = size * (x.chunk_size if together else most // len(group))
            for at in range(0, longest, step):
                levels = [
                    [(bounds[n] + t, min(size, sizes[n] - t)) for n in group if sizes[n] > t]
                    for t in range(at, min(at + step, longest), size)
                ]
                blocks.append(Block(levels, first, size, x.query.device))
        order = torch.tensor(order, device=x.query.device)
        return Layout(blocks, order, order.argsort())

    def rank(self, states: Tensor) -> Tensor:
        """[N, H, ...] -> a copy in the order of ranks, [N * H, ...]"""
        return states[self.order].flatten(0, 1)

    def unrank(self, states: Tensor) -> Tensor:
        """What rank() made, in the order of the sequences."""
        return states.unflatten(0, (len(self.place), -1))[self.place]


class Block:
    """Chunks that are computed together.

    tokens: [chunks, C], place in the flattened [B * T] tokens; any place where padded. padded:
    [chunks, C], or None when every chunk is full. span: all tokens, if they lie side by side, which
    a copy moves faster than an index; else None. ranks: those of the sequences of every level.
    """

    def __init__(
        self, levels: list[list[tuple[int, int]]], first: int, size: int, device: torch.device
    ):
        """levels: the first token of each chunk, and how many of `size` it has; first: the rank of
        the first sequence."""
        self.ranks = [slice(first, first + len(level)) for level in levels]
        chunks = [chunk for level in levels for chunk in level]
        starts, counts = torch.tensor(chunks, device=device).T[..., None]
        column = torch.arange(size, device=device)
        self.tokens, self.padded = starts + column, None
        if any(count < size for _, count in chunks):
            self.padded = column >= counts
            self.tokens = torch.where(self.padded, starts, self.tokens)
        begin, end = chunks[0][0], chunks[0][0] + len(chunks) * size
        whole = chunks == [(at, size) for at in range(begin, end, size)]
        self.span = slice(begin, end) if whole else None
        self._places = {}

    def gather(self, x: Tensor, clear: bool = False) -> Tensor:
        """[B, T, H, D], contiguous -> tiles [chunks, H, C, D].

        Padded places hold some token, or zero with clear.
        """
        if self.span is not None:
            return self._spanned(x).clone(memory_format=torch.contiguous_format)
        rows = self._rows(x.shape[2])
        tiles = x.view(-1, x.shape[3]).index_select(0, rows.flatten()).view(*rows.shape, -1)
        if clear and self.padded is not None:
            tiles.masked_fill_(self.padded[:, None, :, None], 0)
        return tiles

    def scatter(self, tiles: Tensor, out: Tensor) -> None:
        """Write tiles [chunks, H, C, D] into their places of out [B, T, H, D], contiguous."""
        if self.span is not None:
            self._spanned(out).copy_(tiles)
            return
        rows, tiles = self._rows(out.shape[2]), tiles.to(out.dtype)
        if self.padded is not None:
            real = ~self.padded[:, None].expand_as(rows)
            rows, tiles = rows[real], tiles[real]
        out.view(-1, out.shape[3]).index_copy_(0, rows.flatten(), tiles.reshape(-1, out.shape[3]))

    def walk(self, state: Tensor, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        """Views of a state [N * H, ...] in the order of ranks and of tensors [chunks * H, ...],
        level by level."""
        heads = len(tensors[0]) // len(self.tokens)
        first, stops = self.ranks[0].start * heads, [x.stop * heads for x in self.ranks]
        views = {stop: state[first:stop] for stop in set(stops)}  # few: they cost as much as work
        states, sizes = [views[stop] for stop in stops], [stop - first for stop in stops]
        return list(zip(states, *(x.split(sizes) for x in tensors), strict=True))

    def _spanned(self, x: Tensor) -> Tensor:
        """The tokens of `span` of x [B, T, H, D], contiguous, as tiles."""
        tokens = x.view(-1, *x.shape[2:])[self.span]
        return tokens.unflatten(0, self.tokens.shape).transpose(1, 2)

    def _rows(self, heads: int) -> Tensor:
        """[chunks, H, C]: place of every tile row in the flattened [B * T * H] rows."""
        if heads not in self._places:
            head = torch.arange(heads, device=self.tokens.device)[:, None]
            self._places[heads] = self.tokens[:, None] * heads + head
        return self._places[heads]


def forward(x: Any, tiles: Callable[..., Any]) -> tuple[Tensor, Tensor]:
    """Output and final state [N, H, K, V] of an operation whose tokens write to it and read it.

    tiles: makes the tiles of a block, `tiles(x, block, keep)`, with `of_heads` and `to_heads`
    (queries as tiles [chunks * H, G * C, D], and back), `entering_query` (queries with the decay
    since their chunk began), `scores` and

        scan(state)    states before every chunk, and what the tokens write, [chunks * H, C, V]
        backward(d_out, states, written, d_state)    gradients as Block.scatter() takes them

    which take a state [N * H, K, V] and its gradient through the chunks, in place. keep: what
    backward() needs.
    """
    layout, output = Layout.of(x), x.empty_results()[0]
    x, state = contiguous(x), layout.rank(checks.given_or_zeros(x.state, x))
    for block in layout.blocks:
        here = tiles(x, block, keep=False)
        states, written = here.scan(state)
        out = torch.bmm(here.entering_query, states)
        out.baddbmm_(here.scores, written, beta=x.scale, alpha=x.scale)
        block.scatter(here.to_heads(out), output)
    return output, layout.unrank(state)


def backward(
    x: Any, count: int, d_output: Tensor, d_end: Tensor | None, tiles: Callable[..., Any]
) -> tuple[Tensor | None, ...]:
    """Gradients of the first `count` tensors of x and of the state; the tiles are made again."""
    layout = Layout.of(x)
    gradients = [torch.empty_like(y, memory_format=torch.contiguous_format) for y in x[:count]]
    x, d_output = contiguous(x), d_output.contiguous()
    state, d_state = (layout.rank(checks.given_or_zeros(y, x)) for y in (x.state, d_end))
    visited = []
    for block in layout.blocks:
        here = tiles(x, block, keep=True)
        visited.append((here, *here.scan(state)))
    while visited:
        here, states, written = visited.pop()
        d_out = here.of_heads(d_output, clear=True).mul_(x.scale)
        found = here.backward(d_out, states, written, d_state)
        for tile, gradient in zip(found, gradients, strict=True):
            here.block.scatter(tile, gradient.view(*gradient.shape[:3], -1))
    return *gradients, None if x.state is None else layout.unrank(d_state)
