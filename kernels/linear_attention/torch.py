"""Linear attention in plain torch, for any device, fast on a CPU.

The chunks of a sequence go one by one through batched matrix products over heads, so that what is
computed stays in the cache, and memory does not grow with the text. A batch goes in groups of rows,
just enough to fill the products; a packed row goes sequence by sequence.

Legend: a lane is one state head of one sequence; C tokens of a chunk; R query heads of a lane,
which make one tile of R * C rows. Key heads that serve several lanes are copied a chunk at a time.
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
        outputs = group.pieces(output, chunk_size)
        weighed = group.pieces(weights, chunk_size) if normalized else None
        for i, chunk in enumerate(_chunks(group, query, key, value, decay, chunk_size, s)):
            scores = chunk.scores()
            out = chunk.enter(torch.bmm(chunk.query, s)).baddbmm_(scores, chunk.value)
            if normalized:
                weight = chunk.enter(torch.bmm(chunk.query, z[..., None]))
                weight += scores.sum(-1, keepdim=True)
                _write(weighed[i], weight)
                out /= weight + eps
            elif scale != 1:
                out *= scale
            _write(outputs[i], out)
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
    if log_decay is not None:
        d_decays = start[0].new_empty(*query.shape[:2], log_decay.shape[-1], 1)
        d_inputs.append(d_decays)
    for group in groups:
        s, z = _copies(*group.state(*start))
        ds, dz = group.state(*d_state)
        decay = _Decay.of(log_decay, group, chunk_size, dtype)
        chunks = _chunks(group, query, key, value, decay, chunk_size, s)
        given = [group.pieces(x, chunk_size) for x in (d_output, output)]
        given += [group.pieces(weights[..., None], chunk_size)] if normalized else []
        given = list(zip(*given, strict=True))
        found = list(zip(*(group.pieces(x, chunk_size) for x in d_inputs), strict=True))
        starts = list(range(0, len(given), SPAN))
        kept = []
        for at in starts:
            kept.append(_copies(s, z))
            for i in range(at, at + SPAN) if at != starts[-1] else ():
                chunks[i].update(s, z)
        for at in reversed(starts):
            span = range(at, min(at + SPAN, len(given)))
            s, z = kept.pop()
            held = []
            for i in span:
                held.append((chunks[i], *_copies(s, z)))
                held[-1][0].update(s, z)
            for i in reversed(span):
                chunk, s, z = held.pop()
                do, delta = _output_gradient(chunk, *given[i], scale=scale, eps=eps)
                gradients = _chunk_gradients(chunk, do, delta, s, z, ds, dz)
                for out, x in zip(found[i], gradients, strict=False):
                    _write(out, x)

    d_log_decay = None
    if log_decay is not None:
        d_log_decay = d_decays[..., 0] if log_decay.dim() == 3 else d_decays.sum((0, 1, 3))
        lost = log_decay < LOWEST_LOG_DECAY
        d_log_decay = d_log_decay.masked_fill(lost, 0).to(log_decay.dtype)
    d_memory = None if memory is None else d_state[0]
    return *d_inputs[:3], d_log_decay, d_memory, None if normalizer is None else d_state[1]


def _output_gradient(
    chunk: "_Chunk",
    d_output: Tensor,
    output: Tensor,
    weights: Tensor | None = None,
    *,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the undivided output [lanes, R * C, V] and of the weights [lanes, R * C, 1]."""
    do = chunk.tile(d_output)
    if weights is None:
        return do * scale if scale != 1 else do, None
    inverse = (chunk.tile(weights) + eps).reciprocal_()
    delta = (do * chunk.tile(output)).sum(-1, keepdim=True).mul_(inverse).neg_()
    return do * inverse, delta


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

    The gradient of a running sum of logs is q . dq of its row less k . dk of its column.
    """
    q, k, v, decay = chunk.query, chunk.key, chunk.value, chunk.decay
    d_scores = torch.bmm(do, v.mT)
    if delta is not None:
        d_scores += delta
    chunk.mask(d_scores)
    dv = torch.bmm(chunk.scores().mT, do)
    do = chunk.enter(do)
    dq = torch.bmm(do, s.mT)
    dk = torch.bmm(v, ds.mT)
    if delta is not None:
        delta = chunk.enter(delta)
        dq.addcmul_(delta, z[:, None])
        dk += dz[:, None]
    dv.baddbmm_(chunk.weighted, ds)
    if decay is not None:
        along = (dk * chunk.weighted).sum((1, 2)) + decay.whole[chunk.index, :, 0, 0] * (
            (s * ds).sum((1, 2)) + (0 if delta is None else (z * dz).sum(1))
        )
        dk *= chunk.leave
        ds *= decay.whole[chunk.index]
        if delta is not None:
            dz *= decay.whole[chunk.index, :, 0]
    dq.baddbmm_(d_scores, k)
    dk.baddbmm_(d_scores.mT, q)
    ds.baddbmm_(q.mT, do)
    if delta is not None:
        dz += torch.bmm(q.mT, delta)[..., 0]
    if decay is None:
        return dq, dk, dv, None
    d_sums = (q * dq).sum(-1).view(len(k), -1, k.shape[1]).sum(1) - (k * dk).sum(-1)
    d_sums[:, -1] += along
    return dq, dk, dv, d_sums.flip(-1).cumsum(-1).flip(-1)[..., None]


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

    def pieces(self, x: Tensor, chunk_size: int) -> tuple[Tensor, ...]:
        """[B, T, H, D] -> views [rows, H, C, D], one for each chunk."""
        x = x[self.rows, self.begin : self.end].transpose(1, 2)
        return x.split(chunk_size, 2)


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
    """Tiles of one chunk: query [lanes, R * C, K], key [lanes, C, K], value [lanes, C, V]."""

    def __init__(self, index: int, tiles: tuple[Tensor, ...], decay: _Decay | None, state: Tensor):
        self.index, self.decay = index, decay
        self.lanes, self.dtype = len(state), state.dtype
        self.query, self.key, self.value = (self.tile(x) for x in tiles)
        self.size = self.key.shape[1]

    def tile(self, x: Tensor) -> Tensor:
        """[rows, H, C, D] -> [lanes, H / Hs * C, D]; heads that lanes share are repeated."""
        rows, heads = x.shape[:2]
        x = x.to(self.dtype)
        if rows * heads < self.lanes:
            x = x[:, :, None].expand(-1, -1, self.lanes // (rows * heads), -1, -1)
        return x.contiguous().view(self.lanes, -1, x.shape[-1])

    @cached_property
    def within(self) -> Tensor:
        """[lanes, 1, C, C], the decay from column to row."""
        return self.decay.within(self.index, self.size)[:, None]

    @cached_property
    def leave(self) -> Tensor:
        """[lanes, C, 1], the decay from a token to the end of the chunk."""
        return self.decay.leave[self.index, :, : self.size, None]

    @cached_property
    def weighted(self) -> Tensor:
        return self.key if self.decay is None else self.key * self.leave

    def enter(self, x: Tensor) -> Tensor:
        """Rows [lanes, R * C, D] with the decay since the chunk began."""
        if self.decay is None:
            return x
        enter = self.decay.enter[self.index, :, None, : self.size, None]
        return (x.view(self.lanes, -1, self.size, x.shape[2]) * enter).view(x.shape)

    def mask(self, scores: Tensor) -> Tensor:
        """Scores [lanes, R * C, C] times the decay between their tokens, in place."""
        tiles = scores.view(self.lanes, -1, self.size, self.size)
        if self.decay is None:
            tiles.tril_()
        else:
            tiles *= self.within
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
        s.baddbmm_(self.weighted.mT, self.value)
        if z is not None:
            z += self.weighted.sum(1)


class _chunks:
    """The chunks of a group, made when they are asked for."""

    def __init__(self, group, query, key, value, decay, chunk_size, state):
        pieces = (group.pieces(x, chunk_size) for x in (query, key, value))
        self.pieces = list(zip(*pieces, strict=True))
        self.decay, self.state = decay, state

    def __getitem__(self, i: int) -> _Chunk:
        return _Chunk(i, self.pieces[i], self.decay, self.state)


def _write(out: Tensor, tiles: Tensor) -> None:
    """Tiles [lanes, H / Hs * C, D] into [rows, H, C, D]; what was repeated is summed."""
    lanes = tiles.shape[0] * tiles.shape[1] // out.shape[2]
    shared = lanes // (out.shape[0] * out.shape[1])
    if shared > 1:
        tiles = tiles.view(*out.shape[:2], shared, *out.shape[2:]).sum(2)
    out.copy_(tiles.view(out.shape))
