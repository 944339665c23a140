"""The blocks in which torch computes linear attention, and the tiles of a block.

A block is some chunks of a sequence, for batched matrix products over chunks and heads: enough of
them to be worth the calls, and few enough for what is computed to stay in the cache. A batch goes
in groups of rows; a packed row goes sequence by sequence.

Legend: a lane is one state head of one sequence; n chunks of C tokens in a block; R query heads of
a lane, which make one tile of R * C rows. Key heads that serve several lanes are copied by block. A
query and a key that were expanded to all heads, as in Mamba-2, are not.
"""

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from supra.kernels import checks
from supra.kernels.chunks import Group, decay_of, pairwise_decay, split_groups
from supra.kernels.linear_attention.inputs import Inputs

# Tiles that a product should have: with fewer the calls cost more than the work
TILES = 32

State = tuple[Tensor | None, Tensor | None]


def split_rows(x: Inputs) -> list[Group]:
    """Groups of as many rows as fill TILES."""
    tokens = x.key.shape[2] * min(x.query.shape[1], x.chunk_size)
    return split_groups(x.query, x.cu_seqlens, -(-TILES * x.chunk_size // tokens))


def state_of(group: Group, memory: Tensor, normalizer: Tensor | None) -> State:
    """The group's part of a state, [lanes, K, V] and [lanes, K], as views."""
    s = memory[group.states].flatten(0, 1)
    return s, None if normalizer is None else normalizer[group.states].flatten(0, 1)


class Blocks:
    """The blocks of a group, each made when it is asked for."""

    def __init__(self, group: Group, x: Inputs, state: Tensor):
        self.group, self.lanes, self.dtype = group, len(state), state.dtype
        self.bounds = [*range(0, group.end - group.begin, x.chunk_size), group.end - group.begin]
        self.spans = self._spans(x.chunk_size)
        self.inputs = list(zip(*map(self.split, x[:3]), strict=True))
        self.logs = [None] * len(self.spans)
        if x.log_decay is not None:
            self.logs = self.split(x.log_decay.expand(*x.query.shape[:2], -1)[..., None])

    def _spans(self, chunk_size: int) -> list[tuple[int, int]]:
        """First chunk of every block and the chunk after it; a block has chunks of one size."""
        full, some = divmod(self.bounds[-1], chunk_size)
        most = max(1, TILES // self.lanes)
        found = [(i, min(i + most, full)) for i in range(0, full, most)]
        return [*found, (full, full + 1)] if some else found

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """[B, T, H, D] -> views [rows, H, n * C, D], one for each block."""
        x = x[self.group.rows, self.group.begin : self.group.end].transpose(1, 2)
        return x.split([self.bounds[end] - self.bounds[first] for first, end in self.spans], 2)

    def __iter__(self) -> Iterator["Block"]:
        return (self[i] for i in range(len(self.spans)))

    def __getitem__(self, i: int) -> "Block":
        first, end = self.spans[i]
        return Block(self.inputs[i], self.logs[i], self.lanes, end - first, self.dtype)


class Block:
    """Tiles of n chunks: query [tiles, R * C, K], key [tiles, C, K], value [tiles, C, V].

    There are lanes * n tiles, those of a lane in a row. Decay: `entering` [tiles, C, 1] since the
    chunk began, `leaving` [tiles, C, 1] until it ends, `whole` [tiles, 1, 1] of all its tokens.
    """

    def __init__(
        self,
        inputs: tuple[Tensor, ...],
        logs: Tensor | None,
        lanes: int,
        chunks: int,
        dtype: torch.dtype,
    ):
        self.inputs, self.lanes, self.chunks, self.dtype = inputs, lanes, chunks, dtype
        self.size = inputs[0].shape[2] // chunks
        self.key, self.value = self.head_tile(inputs[1]), self.tile(inputs[2])
        self.sums = self.entering = self.leaving = self.whole = None
        if logs is not None:
            # with resets among them, float32 would lose the digits of small differences
            wide = torch.float32 if logs.device.type == "mps" else torch.float64
            logs = logs.reshape(lanes * chunks, self.size, 1).to(wide)
            self.sums = logs.clamp(min=checks.LOWEST_LOG_DECAY).cumsum(1)
            last = self.sums[:, -1:]
            self.entering, self.leaving, self.whole = (
                decay_of(x, dtype) for x in (self.sums, last - self.sums, last)
            )

    @cached_property
    def query(self) -> Tensor:
        return self.head_tile(self.inputs[0])

    @cached_property
    def pairwise(self) -> Tensor | None:
        """[tiles, C, C], decay from column to row."""
        return None if self.sums is None else pairwise_decay(self.sums, self.dtype)

    def head_tile(self, x: Tensor) -> Tensor:
        """tile(x) for queries or keys, which are only read: one head that was expanded to all lanes
        is not copied for them, and then has stride 0."""
        one = x.stride(1) == 0 and len(x) == self.chunks == 1 and 1 < x.shape[1] == self.lanes
        return x[0].to(self.dtype) if one else self.tile(x)

    def tile(self, x: Tensor) -> Tensor:
        """[rows, H, n * C, D] -> [tiles, H / Hs * C, D], a copy; heads that lanes share are
        repeated."""
        rows, heads = x.shape[:2]
        x = x.unflatten(2, (self.chunks, self.size))
        if rows * heads < self.lanes:
            x = x[:, :, None].expand(-1, -1, self.lanes // (rows * heads), -1, -1, -1)[
                :, :, :, None
            ]
        else:
            x = x.unflatten(1, (self.lanes // rows, 1, -1))
        x = x.transpose(3, 4)  # [rows, Hkv, S, n, R, C, D]
        out = x.new_empty(x.shape, dtype=self.dtype).copy_(x)
        return out.view(self.lanes * self.chunks, -1, x.shape[-1])

    def write(self, out: Tensor, tiles: Tensor) -> None:
        """Tiles [tiles, H / Hs * C, D] into [rows, H, n * C, D]; what was repeated is summed."""
        rows, heads = out.shape[:2]
        tiles = tiles.view(self.lanes, self.chunks, -1, self.size, tiles.shape[2])
        if rows * heads < self.lanes:
            tiles = tiles.unflatten(0, (rows * heads, -1)).sum(1)
        tiles = tiles.transpose(1, 2).reshape(out.shape)
        out.copy_(tiles)

    def weigh(self, x: Tensor, factor: Tensor | None) -> Tensor:
        """x [tiles, R * C, D] times factor [tiles, C, D or 1], in place."""
        if factor is not None:
            x.view(len(x), -1, self.size, x.shape[2]).mul_(factor[:, None])
        return x

    def decay_pairs(self, scores: Tensor) -> Tensor:
        """Scores [tiles, R * C, C] times their decay, and zero where later than their row, in
        place."""
        self.weigh(scores, self.pairwise).view(-1, self.size, self.size).tril_()
        return scores

    def scores(self) -> Tensor:
        query, key = self.query, self.key
        if self.lanes > 1 and query.stride(0) == key.stride(0) == 0:  # the same for all lanes
            return self.decay_pairs(torch.bmm(query[:1], key[:1].mT).repeat(self.lanes, 1, 1))
        return self.decay_pairs(torch.bmm(query, key.mT))

    def states(self, s: Tensor, z: Tensor | None) -> State:
        """States [tiles, K, V] that the chunks enter with; s and z are taken to the block's end."""
        value = self.value if self.leaving is None else self.value * self.leaving
        states = self.scan(torch.bmm(self.key.mT, value), s)
        if z is None:
            return states, None
        key = self.key if self.leaving is None else self.key * self.leaving
        return states, self.scan(key.sum(1), z)

    def scan(self, steps: Tensor, state: Tensor, back: bool = False) -> Tensor:
        """The states [tiles, ...] before the steps [tiles, ...] of the chunks; the state
        [lanes, ...] is taken through all of them, in place."""
        whole, found = self.whole, torch.empty_like(steps)
        if whole is not None:
            whole = whole.view(self.lanes, self.chunks, *[1] * (state.dim() - 1))
        steps, before = (x.view(self.lanes, self.chunks, *state.shape[1:]) for x in (steps, found))
        for i in reversed(range(self.chunks)) if back else range(self.chunks):
            before[:, i].copy_(state)
            if whole is None:
                state += steps[:, i]
            else:
                torch.addcmul(steps[:, i], state, whole[:, i], out=state)
        return found
