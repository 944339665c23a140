"""Linear attention in plain torch, for any device; chunks as batched matrix products.

Legend: C chunk length, G query heads per key head, R query heads per state head (1 or G). A tile is
one chunk of one head, [C, D]. States are kept transposed, [N, H, V, K], so that the products need
no copy; with a normalizer a column of ones is added to the values (V + 1 in all), which makes the
normalizer one more row of the state and its gradient one more column.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# exp(-104) is 0 in float32; a lower sum of logs would only cost the differences their digits
LOWEST_LOG_DECAY = -104.0

State = tuple[Tensor, Tensor | None]


def recurrent(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    state: State,
    *,
    scale: float,
    eps: float,
) -> tuple[Tensor, State]:
    """The recurrence of api.py, token by token. Shapes and results as there."""
    memory, normalizer = state
    dtype, (heads, kv_heads) = memory.dtype, (memory.shape[1], key.shape[2])
    decay = None if log_decay is None else log_decay.to(dtype).exp()
    query = query.to(dtype).unflatten(2, (heads, -1))
    key, value = (
        x.to(dtype)[:, :, :, None].expand(-1, -1, -1, heads // kv_heads, -1).flatten(2, 3)
        for x in (key, value)
    )
    outputs = []
    for t in range(query.shape[1]):
        q, k, v = query[:, t], key[:, t], value[:, t]
        if decay is not None:
            a = (decay if decay.dim() == 1 else decay[:, t])[..., None]
            memory = memory * a[..., None]
            normalizer = None if normalizer is None else normalizer * a
        memory = torch.addcmul(memory, k[..., None], v[..., None, :])
        output = q @ memory
        if normalizer is None:
            output = output * scale
        else:
            normalizer = normalizer + k
            output = output / (q @ normalizer[..., None] + eps)
        outputs.append(output.flatten(1, 2))
    return torch.stack(outputs, 1), (memory, normalizer)


def chunk(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    state: State,
    *,
    bounds: list[int],
    chunk_size: int,
    scale: float,
    eps: float,
) -> tuple[Tensor, State]:
    """The same function in chunks. bounds: as in reference.py."""
    memory, normalizer = state
    layout = Layout.of(bounds, chunk_size, query.device)
    start = memory.mT
    if normalizer is not None:
        start = torch.cat((start, normalizer[:, :, None]), 2)
    sums = shared_sums = None
    if log_decay is not None:
        log_decay = log_decay.to(memory.dtype).clamp(min=LOWEST_LOG_DECAY)
        sums = layout.decay_sums(log_decay)
        if log_decay.dim() == 1:
            steps = torch.arange(1, sums.shape[2] + 1, device=query.device)
            # a constant decay has the same [C, C] factors in every chunk, padded or not
            shared_sums = (log_decay.detach()[:, None] * steps)[None]
    start = start[layout.order]
    options = (shared_sums, layout, normalizer is not None, scale, eps)
    output, end = _Chunked.apply(query, key, value, sums, start, *options)
    end = end[layout.place].mT
    if normalizer is None:
        return output, (end, None)
    return output, (end[..., :-1], end[..., -1])


def without_autocast(device: torch.device) -> AbstractContextManager:
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


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
    def of(bounds: list[int], chunk_size: int, device: torch.device) -> "Layout":
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
        """Tiles [chunks, H, C, D] -> [B, T, H, D], with B, T and H of `like`."""
        count = like[..., 0].numel()
        rows = self._rows(like.shape[2])
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


class _Tiles:
    """Inputs as tiles, and the factors that carry a token's weight through its chunk.

    query [chunks * Hkv, G * C, K], by_state (the same rows) [chunks * Hs, R * C, K],
    key [chunks * Hkv, C, K], value [chunks * Hkv, C, V], weighted [chunks * Hkv, C, Hs / Hkv * V].
    """

    def __init__(
        self,
        layout: Layout,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sums: Tensor | None,
        shared_sums: Tensor | None,
        start: Tensor,
        normalized: bool,
    ):
        dtype, heads = start.dtype, start.shape[1]
        query, key, value = (layout.gather(x, dtype) for x in (query, key, value))
        if normalized:
            value = F.pad(value, (0, 1), value=1.0)
        chunks, kv_heads, size, width = key.shape
        self.query = query.view(chunks * kv_heads, -1, width)
        self.by_state = query.view(chunks * heads, -1, width)
        self.key = key.flatten(0, 1)
        self.value = self.weighted = layout.clear(value).flatten(0, 1)
        self.grid = (chunks, heads, query.shape[1] // heads, size)
        self.levels, self.whole = layout.levels, None
        if sums is None:
            self.within = query.new_ones(size, size).tril_()
        else:
            last = sums[..., -1:]
            self.within = _pairwise(sums if shared_sums is None else shared_sums)
            self.entering = sums.exp()[:, :, None, :, None]
            self.leaving = (last - sums).exp().view(chunks * kv_heads, -1, size).mT[..., None]
            self.whole = last.exp()[..., None]
            self.weighted = (self.value[:, :, None] * self.leaving).flatten(2)

    def scores(self) -> Tensor:
        """[chunks * Hkv, G * C, C]"""
        scores = torch.bmm(self.query, self.key.mT)
        scores.view(*self.grid, -1).mul_(self.within)
        return scores

    def states(self, start: Tensor) -> tuple[Tensor, Tensor]:
        """States before every chunk, [chunks, Hs, V, K], and after the last of every sequence."""
        steps = torch.bmm(self.weighted.mT, self.key).view(*self.grid[:2], -1, self.key.shape[2])
        return self.scan(steps, start, self.levels)

    def scan(
        self, steps: Tensor, state: Tensor, levels: Iterable[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """state <- whole * state + step, level by level; steps are replaced by the state before."""
        state = state.clone(memory_format=torch.contiguous_format)
        for begin, end in levels:
            before, step = state[: end - begin], steps[begin:end]
            if self.whole is None:
                after = before + step
            else:
                after = torch.addcmul(step, before, self.whole[begin:end])
            step.copy_(before)
            before.copy_(after)
        return steps, state

    def enter(self, rows: Tensor) -> Tensor:
        """Scale rows [chunks * Hs, R * C, V] in place by the decay since their chunk began."""
        if self.whole is not None:
            rows.view(*self.grid, -1).mul_(self.entering)
        return rows


def _pairwise(sums: Tensor) -> Tensor:
    """[n, H, C] -> [n, H, 1, C, C], decay from column to row; the log is masked before exp."""
    logs = sums[..., :, None] - sums[..., None, :]
    future = torch.ones(logs.shape[-2:], dtype=torch.bool, device=sums.device).triu_(1)
    return logs.masked_fill_(future, -torch.inf).exp_()[:, :, None]


class _Chunked(torch.autograd.Function):
    """Saves inputs and output only; states and scores are computed again in the backward pass."""

    @staticmethod
    def forward(ctx, query, key, value, sums, start, shared_sums, layout, normalized, scale, eps):
        tiles = _Tiles(layout, query, key, value, sums, shared_sums, start, normalized)
        states, end = tiles.states(start)
        out = tiles.enter(torch.bmm(tiles.by_state, states.flatten(0, 1).mT))
        out = out.view(*tiles.query.shape[:2], -1).baddbmm_(tiles.scores(), tiles.value)
        inverse = None
        if normalized:
            inverse = (out[..., -1:] + eps).reciprocal_()
            out = out[..., :-1] * inverse
        elif scale != 1:
            out *= scale
        output = layout.scatter(out, query)
        ctx.save_for_backward(query, key, value, sums, start, shared_sums, output, inverse)
        ctx.layout, ctx.scale, ctx.eps = layout, scale, eps
        return output, end

    @staticmethod
    @once_differentiable
    def backward(ctx, d_output, d_end):
        with without_autocast(d_output.device):
            return *_gradients(ctx, d_output, d_end), *[None] * 5


def _gradients(ctx, d_output: Tensor, d_end: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, sums and start.

    The gradient of a running sum of logs follows from q . dq = o . do of its row and from
    k . dk = v . dv of its column, which need no pass over K.
    """
    query, key, value, sums, start, shared_sums, output, inverse = ctx.saved_tensors
    layout, dtype = ctx.layout, start.dtype
    tiles = _Tiles(layout, query, key, value, sums, shared_sums, start, inverse is not None)
    states, _ = tiles.states(start)

    # d_out: gradient of the undivided output; along: its product with that output
    d_out = layout.clear(layout.gather(d_output, dtype)).view(*tiles.query.shape[:2], -1)
    along = (d_out * layout.gather(output, dtype).view_as(d_out)).sum(-1, keepdim=True)
    if inverse is not None:
        along *= inverse
        d_out = torch.cat((d_out * inverse, -along), -1)
        along *= ctx.eps
    elif ctx.scale != 1:
        d_out *= ctx.scale

    scores = tiles.scores()
    d_scores = torch.bmm(d_out, tiles.value.mT)
    d_sums = None
    if sums is not None:
        products = (scores * d_scores).view(*tiles.grid, -1)
        d_sums = along.view(tiles.grid).sum(2) - products.sum((2, 3))
    d_scores.view(*tiles.grid, -1).mul_(tiles.within)
    d_query = torch.bmm(d_scores, tiles.key)
    d_key = torch.bmm(d_scores.mT, tiles.query)
    d_value = torch.bmm(scores.mT, d_out)

    d_out = tiles.enter(d_out.view(*tiles.by_state.shape[:2], -1))
    d_query.view_as(tiles.by_state).baddbmm_(d_out, states.flatten(0, 1))
    steps = torch.bmm(d_out.mT, tiles.by_state).view_as(states)
    d_states, d_start = tiles.scan(steps, d_end, reversed(layout.levels))
    d_wide = d_states.view(tiles.key.shape[0], -1, tiles.key.shape[2])
    d_key.baddbmm_(tiles.weighted, d_wide)
    d_weighted = torch.bmm(tiles.key, d_wide.mT)
    if sums is None:
        d_value += d_weighted
    else:
        d_weighted = d_weighted.unflatten(2, (-1, d_value.shape[2])).mul_(tiles.leaving)
        d_value += d_weighted.sum(2)
        leaving = (d_weighted * tiles.value[:, :, None]).sum(-1).mT.reshape(sums.shape)
        carried = tiles.whole[..., 0, 0] * (states * d_states).sum((2, 3))
        d_sums -= leaving
        d_sums[..., -1] += leaving.sum(-1) + carried

    d_query = layout.scatter(d_query, query).to(query.dtype)
    d_key = layout.scatter(d_key, key).to(key.dtype)
    d_value = layout.scatter(d_value[..., : value.shape[3]], value).to(value.dtype)
    return d_query, d_key, d_value, d_sums, d_start
