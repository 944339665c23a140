"""The blocks in which torch computes linear attention, and the tiles of a block.

A block is some chunks of a sequence, for batched matrix products over chunks and heads: enough of
them to be worth the calls, and few enough for what is computed to stay in the cache. A batch goes
in groups of rows; a packed row goes sequence by sequence.

Legend: a lane is one state head of one sequence; n chunks of C tokens in a block; R query heads of
a lane, which make one tile of R * C rows. Key heads that serve several lanes are copied by block.
"""

from collections.abc import Iterator
from functools import cached_property
from itertools import groupby, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from supra.kernels import checks
from supra.kernels.chunks import Group, split_groups
from supra.kernels.linear_attention.inputs import Inputs

# Tiles that a product should have: with fewer the calls cost more than the work
TILES = 32
# Decay within a chunk, as a sum of logs, at the most: its tokens are weighed by exp(+-40), and
# their products stay above float32's subnormals, which take a CPU 100 times as long
WIDEST_DECAY = 80.0

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
        length = group.end - group.begin
        self.bounds = [*range(0, length, x.chunk_size), length]
        self.decay = None
        if x.log_decay is not None:
            logs = x.log_decay.expand(*x.query.shape[:2], -1)[group.rows, group.begin : group.end]
            # over a long text, float32 would lose the digits of small differences
            dtype = torch.float32 if logs.device.type == "mps" else torch.float64
            logs = logs.to(dtype).clamp(min=checks.LOWEST_LOG_DECAY)
            sums = logs.cumsum(1).transpose(1, 2).flatten(0, 1)
            self.bounds = _narrow_bounds(sums, self.bounds)
            self.decay = self._factors(sums)
        self.spans = self._spans()
        self.inputs = list(zip(*map(self.split, x[:3]), strict=True))

    def _spans(self) -> list[tuple[int, int]]:
        """First chunk of every block and the chunk after it; a block has chunks of one size."""
        sizes = [end - begin for begin, end in pairwise(self.bounds)]
        most = max(1, TILES // self.lanes)
        found, at = [], 0
        for _, same in groupby(sizes):
            end = at + len(list(same))
            found += [(i, min(i + most, end)) for i in range(at, end, most)]
            at = end
        return found

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """[B, T, H, D] -> views [rows, H, n * C, D], one for each block."""
        x = x[self.group.rows, self.group.begin : self.group.end].transpose(1, 2)
        return x.split([self.bounds[end] - self.bounds[first] for first, end in self.spans], 2)

    def _factors(self, sums: Tensor) -> tuple[Tensor, ...]:
        """entry [lanes, chunks], rise and fall [lanes, T], exit [lanes, chunks].

        rise[i] * fall[j] is the decay from token j to token i. Both refer to the middle of the
        chunk's decay: entry is the decay of the state up to there, exit the one from there on.
        """
        bounds = torch.tensor(self.bounds, device=sums.device)
        first, last = sums[:, bounds[:-1]], sums[:, bounds[1:] - 1]
        middle = (first + last) / 2
        before = F.pad(last[:, :-1], (1, 0))
        inside = sums - middle.repeat_interleave(bounds.diff(), 1)
        factors = (middle - before, inside, -inside, last - middle)
        return tuple(x.exp().to(self.dtype) for x in factors)

    def __iter__(self) -> Iterator["Block"]:
        return (self[i] for i in range(len(self.spans)))

    def __getitem__(self, i: int) -> "Block":
        first, end = self.spans[i]
        factors = (None,) * 4
        if self.decay is not None:
            chunks, tokens = slice(first, end), slice(self.bounds[first], self.bounds[end])
            entry, rise, fall, exit_ = self.decay
            factors = entry[:, chunks], rise[:, tokens], fall[:, tokens], exit_[:, chunks]
        return Block(self.inputs[i], factors, self.lanes, end - first, self.dtype)


def _narrow_bounds(sums: Tensor, bounds: list[int]) -> list[int]:
    """Bounds of chunks, with more of them where the decay of a head within one is too wide.

    The decay of a chunk's first token acts on the state alone, so a reset costs a chunk, no more.
    """
    sums = sums.nan_to_num()  # a head that diverged has no width: it must not hold the others up
    found = []
    for begin, end in pairwise(bounds):
        while begin < end:
            found.append(begin)
            width = (sums[:, begin, None] - sums[:, begin:end]).amax(0)
            begin += int((width <= WIDEST_DECAY).sum())
    return [*found, bounds[-1]]


class Block:
    """Tiles of n chunks: query [tiles, R * C, K], key [tiles, C, K], value [tiles, C, V].

    There are lanes * n tiles, those of a lane in a row. Query and key have their decay multiplied
    in, so that what is left is attention without decay.
    """

    def __init__(
        self,
        inputs: tuple[Tensor, ...],
        factors: tuple[Tensor | None, ...],
        lanes: int,
        chunks: int,
        dtype: torch.dtype,
    ):
        self.inputs, self.lanes, self.chunks, self.dtype = inputs, lanes, chunks, dtype
        self.size = inputs[0].shape[2] // chunks
        self.entry, self.rise, self.fall, self.exit = factors
        self.key = self.tile(inputs[1], self.fall)
        self.value = self.tile(inputs[2])

    @cached_property
    def query(self) -> Tensor:
        return self.tile(self.inputs[0], self.rise)

    def tile(self, x: Tensor, factor: Tensor | None = None) -> Tensor:
        """[rows, H, n * C, D] -> [tiles, H / Hs * C, D], times factor [lanes, n * C].

        Heads that lanes share are repeated.
        """
        rows, heads = x.shape[:2]
        x = x.unflatten(2, (self.chunks, self.size))
        if rows * heads < self.lanes:
            x = x[:, :, None].expand(-1, -1, self.lanes // (rows * heads), -1, -1, -1)[
                :, :, :, None
            ]
        else:
            x = x.unflatten(1, (self.lanes // rows, 1, -1))
        x = x.transpose(3, 4)  # [rows, Hkv, S, n, R, C, D]
        out = x.new_empty(x.shape, dtype=self.dtype)
        if factor is None:
            out.copy_(x)
        else:
            shape = (*x.shape[:4], 1, self.size, 1)
            torch.mul(x, factor.reshape(shape), out=out)
        return out.view(self.lanes * self.chunks, -1, x.shape[-1])

    def write(self, out: Tensor, tiles: Tensor) -> None:
        """Tiles [tiles, H / Hs * C, D] into [rows, H, n * C, D]; what was repeated is summed."""
        rows, heads = out.shape[:2]
        tiles = tiles.view(self.lanes, self.chunks, -1, self.size, tiles.shape[2])
        if rows * heads < self.lanes:
            tiles = tiles.unflatten(0, (rows * heads, -1)).sum(1)
        tiles = tiles.transpose(1, 2).reshape(out.shape)
        out.copy_(tiles)

    def rescale(self, x: Tensor, factor: Tensor) -> Tensor:
        """Tiles [tiles, R * C, D] times [lanes, n * C]."""
        factor = factor.reshape(len(x), 1, self.size, 1)
        return (x.view(len(x), -1, self.size, x.shape[2]) * factor).view(x.shape)

    def mask(self, scores: Tensor) -> Tensor:
        """Zero what is later than its row in scores [tiles, R * C, C], in place."""
        scores.view(-1, self.size, self.size).tril_()
        return scores

    def scores(self) -> Tensor:
        return self.mask(torch.bmm(self.query, self.key.mT))

    def states(self, s: Tensor, z: Tensor | None) -> State:
        """States [tiles, K, V] that the chunks enter with; s and z are taken to the block's end."""
        states = self.scan(torch.bmm(self.key.mT, self.value), s)
        return states, None if z is None else self.scan(self.key.sum(1), z)

    def scan(self, steps: Tensor, state: Tensor, back: bool = False) -> Tensor:
        """Take a state [lanes, ...] through the steps [tiles, ...] of its chunks, in place.

        Each step is replaced by the state that it is added to.
        """
        shape = (self.lanes, self.chunks, *[1] * (state.dim() - 1))
        factors = (self.exit, self.entry) if back else (self.entry, self.exit)
        before, after = (None if x is None else x.reshape(shape) for x in factors)
        by_lane = steps.view(self.lanes, self.chunks, *state.shape[1:])
        for i in reversed(range(self.chunks)) if back else range(self.chunks):
            if before is not None:
                state *= before[:, i]
            step = by_lane[:, i]
            reached = state + step
            step.copy_(state)
            if after is None:
                state.copy_(reached)
            else:
                torch.mul(reached, after[:, i], out=state)
        return steps
