"""Linear attention in plain torch, for any device, fast on a CPU.

The chunks of a sequence go one by one through batched matrix products over heads, so that what is
computed stays in the cache, and memory does not grow with the text. A batch goes in groups of rows,
just enough to fill the products; a packed row goes sequence by sequence.

Legend: C tokens of a chunk; G query heads per key head, R per state head, S state heads per key
head. A tile is one chunk of one head, [C, D]; query heads that share a key head are one tile of
G * C rows.
"""

from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from supra.kernels import checks

# exp(-104) is 0 in float32
LOWEST_LOG_DECAY = -104.0
# Tiles that a product should have: with fewer the calls cost more than the work
TILES = 8
# Chunks whose states the backward pass holds at a time; it keeps one state for each such span
SPAN = 64
# exp(80) and exp(-80) are normal in float32, so down to exp(-160) a decay splits into two factors
WIDEST_DECAY = -160.0

State = tuple[Tensor | None, Tensor | None]


def recurrent(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    state: State,
    *,
    normalized: bool,
    scale: float,
    eps: float,
    in_place: bool = False,
) -> tuple[Tensor, State]:
    """The recurrence of api.py, token by token. Shapes and results as there."""
    multiply, insert, add = torch.mul, torch.addcmul, torch.add
    if in_place:
        multiply, insert, add = Tensor.mul_, Tensor.addcmul_, Tensor.add_
    memory, normalizer = _start(*state, query, key, value, log_decay, normalized, len(query))
    dtype, (heads, kv_heads) = memory.dtype, (memory.shape[1], key.shape[2])
    decay = None if log_decay is None else log_decay.to(dtype).exp()
    output_dtype = value.dtype
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
            memory = multiply(memory, a[..., None])
            normalizer = None if normalizer is None else multiply(normalizer, a)
        memory = insert(memory, k[..., None], v[..., None, :])
        output = q @ memory
        if normalizer is None:
            output = output * scale
        else:
            normalizer = add(normalizer, k)
            output = output / (q @ normalizer[..., None] + eps)
        outputs.append(output.flatten(1, 2))
    return torch.stack(outputs, 1).to(output_dtype), (memory, normalizer)


def chunk_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    memory: Tensor | None,
    normalizer: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    normalized: bool,
    scale: float,
    eps: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The same function in chunks; arguments and results are those of operator.forward."""
    groups = _groups(query, key, cu_seqlens, chunk_size)
    inputs = (query, key, value, log_decay, normalized, checks.sequences(query, cu_seqlens))
    memory, normalizer = _copies(*_start(memory, normalizer, *inputs))
    output = value.new_empty(*query.shape[:3], value.shape[3])
    weights = memory.new_empty(*query.shape[:3], 1) if normalized else None
    for group in groups:
        s, z = group.state(memory, normalizer)
        decay = _Decay.of(log_decay, group, chunk_size, memory.dtype)
        for chunk in group.chunks(query, key, value, decay, memory.dtype, chunk_size):
            scores = chunk.scores()
            out = chunk.enter(torch.bmm(chunk.by_state(chunk.query), s))
            out = out.view(*scores.shape[:2], -1).baddbmm_(scores, chunk.value)
            if normalized:
                weight = chunk.enter(torch.bmm(chunk.by_state(chunk.query), z[..., None]))
                weight = weight.view(*scores.shape[:2], 1) + scores.sum(-1, keepdim=True)
                chunk.write(weights, weight)
                out /= weight + eps
            elif scale != 1:
                out *= scale
            chunk.write(output, out)
            chunk.update(s, z)
    return output, memory, normalizer, weights[..., 0] if normalized else None


def chunk_backward(
    d_output: Tensor,
    d_memory: Tensor | None,
    d_normalizer: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    memory: Tensor | None,
    normalizer: Tensor | None,
    cu_seqlens: Tensor | None,
    output: Tensor,
    weights: Tensor,
    *,
    normalized: bool,
    scale: float,
    eps: float,
    chunk_size: int,
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, log_decay, memory and normalizer.

    States and scores are computed again, a span of chunks at a time.
    """
    groups = _groups(query, key, cu_seqlens, chunk_size)
    inputs = (query, key, value, log_decay, normalized, checks.sequences(query, cu_seqlens))
    start = _start(memory, normalizer, *inputs)
    d_state = _copies(*_start(d_memory, d_normalizer, *inputs))
    dtype = start[0].dtype
    d_inputs = [x.new_empty(x.shape) for x in (query, key, value)]
    d_decays = None
    if log_decay is not None:
        d_decays = start[0].new_empty(*query.shape[:2], log_decay.shape[-1])
    for group in groups:
        s, z = _copies(*group.state(*start))
        ds, dz = group.state(*d_state)
        decay = _Decay.of(log_decay, group, chunk_size, dtype)
        chunks = group.chunks(query, key, value, decay, dtype, chunk_size)
        spans = [chunks[i : i + SPAN] for i in range(0, len(chunks), SPAN)]
        kept = []
        for i, span in enumerate(spans):
            kept.append(_copies(s, z))
            for chunk in span if i + 1 < len(spans) else ():
                chunk.update(s, z)
        for span in reversed(spans):
            s, z = kept.pop()
            before = []
            for chunk in span:
                before.append(_copies(s, z))
                chunk.update(s, z)
            for chunk in reversed(span):
                do = chunk.tiles(d_output)
                delta = None
                if normalized:
                    inverse = (chunk.tiles(weights[..., None]) + eps).reciprocal_()
                    delta = (do * chunk.tiles(output)).sum(-1, keepdim=True).mul_(inverse).neg_()
                    do = do * inverse
                elif scale != 1:
                    do = do * scale
                *found, d_decay = _chunk_gradients(chunk, do, delta, *before.pop(), ds, dz)
                for out, x in zip(d_inputs, found, strict=True):
                    chunk.write(out, x)
                if d_decays is not None:
                    chunk.write(d_decays[..., None], d_decay[..., None])

    d_log_decay = None
    if log_decay is not None:
        d_log_decay = d_decays if log_decay.dim() == 3 else d_decays.sum((0, 1))
        lost = log_decay < LOWEST_LOG_DECAY
        d_log_decay = d_log_decay.masked_fill(lost, 0).to(log_decay.dtype)
    d_memory = None if memory is None else d_state[0]
    return *d_inputs, d_log_decay, d_memory, None if normalizer is None else d_state[1]


def _chunk_gradients(
    chunk: "_Chunk",
    do: Tensor,
    delta: Tensor | None,
    s: Tensor,
    z: Tensor | None,
    ds: Tensor,
    dz: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv and d_log_decay of one chunk; ds and dz go from the state after to that before.

    do [tiles, G * C, V]: gradient of the undivided output. delta [tiles, G * C, 1]: that of the
    sums of the weights. The gradient of a running sum of logs is q . dq of its row less k . dk of
    its column.
    """
    scores = chunk.scores()
    d_scores = torch.bmm(do, chunk.value.mT)
    if delta is not None:
        d_scores += delta
    across = None if chunk.decay is None else scores * d_scores
    chunk.mask(d_scores)
    dq = torch.bmm(d_scores, chunk.key)
    dk = torch.bmm(d_scores.mT, chunk.query)
    dv = torch.bmm(scores.mT, do)

    do = chunk.enter(chunk.by_state(do))
    chunk.by_state(dq).baddbmm_(do, s.mT)
    weighted, by_key = chunk.weighted, ds.view(chunk.weighted.shape[0], -1, ds.shape[2])
    d_weighted = torch.bmm(chunk.value, by_key.mT)
    dv.baddbmm_(weighted, by_key)
    if delta is not None:
        delta = chunk.enter(chunk.by_state(delta))
        chunk.by_state(dq).addcmul_(delta, z[:, None])
        d_weighted += dz.view(d_weighted.shape[0], 1, -1)

    d_decay = None
    if chunk.decay is None:
        dk += d_weighted
    else:
        lanes, size, width = len(ds), chunk.size, dk.shape[2]
        leaving = (d_weighted * weighted).unflatten(2, (-1, width)).sum(-1).mT.reshape(lanes, size)
        dk += (d_weighted.unflatten(2, (-1, width)) * chunk.leave).sum(2)
        whole = chunk.decay.whole[chunk.index]
        carried = (s * ds).sum((1, 2))
        ds *= whole
        if delta is not None:
            carried += (z * dz).sum(1)
            dz *= whole[:, 0]
        d_sums = (chunk.query * dq).sum(-1).view(lanes, -1, size).sum(1)
        d_sums -= across.view(lanes, -1, size).sum(1)
        d_sums -= leaving
        d_sums[:, -1] += leaving.sum(-1) + whole[:, 0, 0] * carried
        d_decay = d_sums.flip(-1).cumsum(-1).flip(-1)
    query = chunk.by_state(chunk.query)
    ds.baddbmm_(query.mT, do)
    if delta is not None:
        dz += torch.bmm(query.mT, delta)[..., 0]
    return dq, dk, dv, d_decay


def _start(
    memory: Tensor | None,
    normalizer: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    normalized: bool,
    sequences: int,
) -> State:
    """The given state, or zeros where it is None."""
    heads = key.shape[2] if log_decay is None else log_decay.shape[-1]
    dtype = checks.state_dtype(query, key, value)
    if memory is None:
        memory = query.new_zeros(sequences, heads, key.shape[3], value.shape[3], dtype=dtype)
    if normalized and normalizer is None:
        normalizer = query.new_zeros(sequences, heads, key.shape[3], dtype=dtype)
    return memory, normalizer if normalized else None


def _copies(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    layout = torch.contiguous_format
    return tuple(x if x is None else x.clone(memory_format=layout) for x in tensors)


class _Group(NamedTuple):
    """Sequences of one length that go together: rows of a batch, or one of a packed row."""

    rows: slice
    begin: int
    end: int
    states: slice

    def state(self, memory: Tensor, normalizer: Tensor | None) -> State:
        """Their part of a state, [lanes, K, V] and [lanes, K], as views."""
        s = memory[self.states].flatten(0, 1)
        return s, None if normalizer is None else normalizer[self.states].flatten(0, 1)

    def chunks(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        decay: "_Decay | None",
        dtype: torch.dtype,
        chunk_size: int,
    ) -> list["_Chunk"]:
        return [
            _Chunk(
                self.rows,
                slice(at, min(at + chunk_size, self.end)),
                i,
                query,
                key,
                value,
                decay,
                dtype,
            )
            for i, at in enumerate(range(self.begin, self.end, chunk_size))
        ]


def _groups(query: Tensor, key: Tensor, cu_seqlens: Tensor | None, chunk_size: int) -> list[_Group]:
    batch, length = query.shape[:2]
    bounds = checks.bounds(cu_seqlens, batch, length)
    if cu_seqlens is not None:
        row = slice(0, 1)
        spans = enumerate(pairwise(bounds))
        return [_Group(row, *span, slice(n, n + 1)) for n, span in spans if span[0] < span[1]]
    tokens = key.shape[2] * min(length, chunk_size)
    rows = -(-TILES * chunk_size // tokens)
    slices = [slice(at, min(at + rows, batch)) for at in range(0, batch, rows)]
    return [_Group(part, 0, length, part) for part in slices]


class _Decay(NamedTuple):
    """Factors of the decay in the chunks of a group, [chunks, lanes, C] but for `whole`."""

    sums: Tensor  # float64: with resets among the logs float32 would keep 3e-5 of a difference
    enter: Tensor  # from before the chunk to a token
    leave: Tensor  # from a token to the end of the chunk
    whole: Tensor  # [chunks, lanes, 1, 1], of the chunk
    rise: Tensor  # rise[i] * fall[j] is the decay from j to i
    fall: Tensor
    narrow: list[bool]  # by chunk: rise and fall did not overflow
    constant: bool  # one decay for all tokens: the first chunk's factors hold for all

    @staticmethod
    def of(
        log_decay: Tensor | None, group: _Group, chunk_size: int, dtype: torch.dtype
    ) -> "_Decay | None":
        if log_decay is None:
            return None
        logs = log_decay.double().clamp(min=LOWEST_LOG_DECAY)
        length = group.end - group.begin
        constant = log_decay.dim() == 1
        if constant:
            logs = logs.expand(group.rows.stop - group.rows.start, length, -1)
        else:
            logs = logs[group.rows, group.begin : group.end]
        size = min(chunk_size, length)
        logs = F.pad(logs, (0, 0, 0, -length % size)).unflatten(1, (-1, size))
        sums = logs.cumsum(2).permute(1, 0, 3, 2).flatten(1, 2).contiguous()
        last = sums[..., -1:]
        narrow = (last.amin((1, 2)) > WIDEST_DECAY).tolist()
        factors = (sums, last - sums, last[..., None], sums - last / 2, last / 2 - sums)
        return _Decay(sums, *(x.exp().to(dtype) for x in factors), narrow, constant)

    def within(self, chunk: int, size: int) -> Tensor:
        """[lanes, C, C], from column to row; 0 where the column is later."""
        if self.narrow[chunk]:
            rise, fall = self.rise[chunk, :, :size, None], self.fall[chunk, :, None, :size]
            return (rise * fall).tril_()
        sums = self.sums[chunk, :, :size]
        future = torch.ones(size, size, dtype=torch.bool, device=sums.device).triu_(1)
        logs = (sums[..., :, None] - sums[..., None, :]).masked_fill_(future, -torch.inf)
        return logs.to(self.rise.dtype).exp_()


class _Chunk:
    """Tiles of one chunk: query [tiles, G * C, K], key [tiles, C, K], value [tiles, C, V]."""

    def __init__(
        self,
        rows: slice,
        tokens: slice,
        index: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        decay: _Decay | None,
        dtype: torch.dtype,
    ):
        self.rows, self.tokens, self.index, self.decay = rows, tokens, index, decay
        self.dtype, self.kv_heads = dtype, key.shape[2]
        self.query, self.key, self.value = (self.tiles(x) for x in (query, key, value))
        self.size = self.key.shape[1]

    def tiles(self, x: Tensor) -> Tensor:
        """[B, T, H, D] -> [tiles, H / Hkv * C, D]; a view where it can be one."""
        x = x[self.rows, self.tokens].transpose(1, 2).to(self.dtype)
        return x.reshape(x.shape[0] * self.kv_heads, -1, x.shape[3])

    def write(self, out: Tensor, tiles: Tensor) -> None:
        out = out[self.rows, self.tokens].transpose(1, 2)
        out.copy_(tiles.view(out.shape))

    @cached_property
    def within(self) -> Tensor | None:
        """[lanes, 1, C, C], the decay from column to row."""
        return None if self.decay is None else self.decay.within(self.index, self.size)[:, None]

    @cached_property
    def weighted(self) -> Tensor:
        """Keys [tiles, C, S * K] with the decay to the end of the chunk."""
        if self.decay is None:
            return self.key
        return (self.key[:, :, None] * self.leave).flatten(2)

    @property
    def leave(self) -> Tensor:
        """[tiles, C, S, 1]"""
        leave = self.decay.leave[self.index, :, : self.size]
        return leave.view(len(self.key), -1, self.size).mT[..., None]

    def by_state(self, x: Tensor) -> Tensor:
        """[tiles, G * C, D] -> [lanes, R * C, D]"""
        lanes = len(x) if self.decay is None else self.decay.sums.shape[1]
        return x if lanes == len(x) else x.reshape(lanes, -1, x.shape[2])

    def enter(self, x: Tensor) -> Tensor:
        """Rows [lanes, R * C, D] with the decay since the chunk began."""
        if self.decay is None:
            return x
        enter = self.decay.enter[self.index, :, None, : self.size, None]
        return (x.unflatten(1, (-1, self.size)) * enter).flatten(1, 2)

    def mask(self, scores: Tensor) -> Tensor:
        """Scores [tiles, G * C, C] times the decay between their tokens, in place."""
        if self.within is None:
            scores.view(-1, self.size, self.size).tril_()
        else:
            scores.view(len(self.within), -1, self.size, self.size).mul_(self.within)
        return scores

    def scores(self) -> Tensor:
        return self.mask(torch.bmm(self.query, self.key.mT))

    def update(self, s: Tensor, z: Tensor | None) -> None:
        """Take a state [lanes, K, V] from before the chunk to after it, in place."""
        if self.decay is not None:
            whole = self.decay.whole[self.index]
            s *= whole
            if z is not None:
                z *= whole[:, 0]
        weighted = self.weighted
        s.view(len(weighted), -1, s.shape[2]).baddbmm_(weighted.mT, self.value)
        if z is not None:
            z += weighted.sum(1).view_as(z)
