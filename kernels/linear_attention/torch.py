"""Linear attention in plain torch, for any device, fast on a CPU.

The chunks of a sequence go one by one through batched matrix products over heads, so that what is
computed stays in the cache, and memory does not grow with the text. A batch goes in groups of rows,
just enough to fill the products; a packed row goes sequence by sequence.

Legend: a lane is one state head of one sequence; C tokens of a chunk; R query heads of a lane,
which make one tile of R * C rows. Key heads that serve several lanes are copied a chunk at a time.
"""

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
# Decay within a chunk, as a sum of logs, at the most: its tokens are weighed by exp(+-40), and
# their products stay above float32's subnormals, which take a CPU 100 times as long
WIDEST_DECAY = 80.0

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
        chunks = _Chunks(group, query, key, value, log_decay, chunk_size, s)
        outputs = chunks.split(output)
        weighed = chunks.split(weights) if normalized else None
        for i in range(len(outputs)):
            chunk = chunks[i]
            chunk.enter(s, z)
            scores = chunk.scores()
            out = torch.bmm(chunk.query, s).baddbmm_(scores, chunk.value)
            if normalized:
                weight = torch.bmm(chunk.query, z[..., None]) + scores.sum(-1, keepdim=True)
                _write(weighed[i], weight)
                out /= weight + eps
            elif scale != 1:
                out *= scale
            _write(outputs[i], out)
            chunk.leave(s, z)
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
    d_inputs = [x.new_empty(x.shape) for x in (query, key, value)]
    if log_decay is not None:
        d_decays = start[0].new_empty(*query.shape[:2], log_decay.shape[-1], 1)
        d_inputs.append(d_decays)
    for group in groups:
        s, z = _copies(*group.state(*start))
        ds, dz = group.state(*d_state)
        chunks = _Chunks(group, query, key, value, log_decay, chunk_size, s)
        given = [d_output, output, weights[..., None]] if normalized else [d_output]
        given = list(zip(*map(chunks.split, given), strict=True))
        found = list(zip(*map(chunks.split, d_inputs), strict=True))
        starts = range(0, len(given), SPAN)
        kept = []
        for at in starts:
            kept.append(_copies(s, z))
            for i in range(at, at + SPAN) if at != starts[-1] else ():
                chunk = chunks[i]
                chunk.enter(s, z)
                chunk.leave(s, z)
        for at in reversed(starts):
            span = range(at, min(at + SPAN, len(given)))
            s, z = kept.pop()
            held = []
            for i in span:
                chunk = chunks[i]
                chunk.enter(s, z)
                held.append((chunk, *_copies(s, z)))
                chunk.leave(s, z)
            for i in reversed(span):
                chunk, s, z = held.pop()
                do, delta = _output_gradient(chunk, *given[i], scale=scale, eps=eps)
                gradients = _chunk_gradients(chunk, do, delta, s, z, ds, dz)
                for out, x in zip(found[i], gradients, strict=True):
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
    output: Tensor | None = None,
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
) -> tuple[Tensor, ...]:
    """dq, dk, dv and, where there is decay, d_log_decay of one chunk.

    s and z: the state that the chunk entered with. ds and dz go from the gradient of the state
    after the chunk to that before it. The gradient of a running sum of logs is q . dq of its row
    less k . dk of its column; that of the last one has <state, d_state> at the end added.
    """
    q, k, v = chunk.query, chunk.key, chunk.value
    _scale(chunk.exit, ds, dz)
    d_scores = torch.bmm(do, v.mT)
    if delta is not None:
        d_scores += delta
    chunk.mask(d_scores)
    dq = torch.bmm(d_scores, k).baddbmm_(do, s.mT)
    dk = torch.bmm(v, ds.mT)
    dv = torch.bmm(chunk.scores().mT, do).baddbmm_(k, ds)
    if delta is not None:
        dq.addcmul_(delta, z[:, None])
        dk += dz[:, None]
    end = None
    if chunk.rise is not None:
        end = (k * dk).sum((1, 2)) + (s * ds).sum((1, 2))
        if delta is not None:
            end += (z * dz).sum(1)
    dk.baddbmm_(d_scores.mT, q)
    ds.baddbmm_(q.mT, do)
    if delta is not None:
        dz += torch.bmm(q.mT, delta)[..., 0]
    _scale(chunk.entry, ds, dz)
    if end is None:
        return dq, dk, dv
    d_sums = (q * dq).sum(-1).view(len(k), -1, k.shape[1]).sum(1) - (k * dk).sum(-1)
    d_sums[:, -1] += end
    return chunk.rescale(dq, chunk.rise), chunk.rescale(dk, chunk.fall), dv, _suffix_sums(d_sums)


def _suffix_sums(x: Tensor) -> Tensor:
    """[lanes, C] -> [lanes, C, 1]"""
    return x.flip(-1).cumsum(-1).flip(-1)[..., None]


def _scale(factor: Tensor | None, s: Tensor, z: Tensor | None) -> None:
    """A state times [lanes], in place."""
    if factor is not None:
        s *= factor[:, None, None]
        if z is not None:
            z *= factor[:, None]


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


class _Chunks:
    """The chunks of a group, each made when it is asked for."""

    def __init__(
        self,
        group: _Group,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        log_decay: Tensor | None,
        chunk_size: int,
        state: Tensor,
    ):
        self.group, self.lanes, self.dtype = group, len(state), state.dtype
        length = group.end - group.begin
        self.bounds = [*range(0, length, chunk_size), length]
        self.decay = None
        if log_decay is not None:
            logs = log_decay.double().clamp(min=LOWEST_LOG_DECAY)
            if log_decay.dim() == 1:
                logs = logs.expand(group.rows.stop - group.rows.start, length, -1)
            else:
                logs = logs[group.rows, group.begin : group.end]
            # float64: a sum over a long text would cost float32 the digits of small differences
            sums = logs.cumsum(1).transpose(1, 2).flatten(0, 1)
            self.bounds = _narrow_bounds(sums, self.bounds)
            self.decay = self._factors(sums)
        self.inputs = list(zip(*map(self.split, (query, key, value)), strict=True))

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """[B, T, H, D] -> views [rows, H, C, D], one for each chunk."""
        x = x[self.group.rows, self.group.begin : self.group.end].transpose(1, 2)
        return x.split([end - begin for begin, end in pairwise(self.bounds)], 2)

    def _factors(self, sums: Tensor) -> list[tuple[Tensor, ...]]:
        """entry [lanes], rise and fall [lanes, C], exit [lanes] of every chunk.

        rise[i] * fall[j] is the decay from token j to token i. Both refer to the middle of the
        chunk's decay: entry is the decay of the state up to there, exit the one from there on.
        """
        bounds = torch.tensor(self.bounds, device=sums.device)
        first, last = sums[:, bounds[:-1]], sums[:, bounds[1:] - 1]
        middle = (first + last) / 2
        before = F.pad(last[:, :-1], (1, 0))
        inside = sums - middle.repeat_interleave(bounds.diff(), 1)
        sizes = bounds.diff().tolist()
        factors = (middle - before, inside, -inside, last - middle)
        entry, rise, fall, exit_ = (x.exp().to(self.dtype) for x in factors)
        tokens = (rise.split(sizes, 1), fall.split(sizes, 1))
        return list(zip(entry.unbind(1), *tokens, exit_.unbind(1), strict=True))

    def __getitem__(self, i: int) -> "_Chunk":
        factors = (None,) * 4 if self.decay is None else self.decay[i]
        return _Chunk(self.inputs[i], factors, self.lanes, self.dtype)


def _narrow_bounds(sums: Tensor, bounds: list[int]) -> list[int]:
    """Bounds of chunks, with more of them where the decay of a head within one is too wide.

    The decay of a chunk's first token acts on the state alone, so a reset costs a chunk, no more.
    """
    found = []
    for begin, end in pairwise(bounds):
        while begin < end:
            found.append(begin)
            width = (sums[:, begin, None] - sums[:, begin:end]).amax(0)
            begin += int((width <= WIDEST_DECAY).sum())
    return [*found, bounds[-1]]


class _Chunk:
    """Tiles of one chunk: query [lanes, R * C, K], key [lanes, C, K], value [lanes, C, V].

    Query and key have their decay multiplied in, so that what is left is attention without decay.
    """

    def __init__(
        self,
        inputs: tuple[Tensor, ...],
        factors: tuple[Tensor | None, ...],
        lanes: int,
        dtype: torch.dtype,
    ):
        self.lanes, self.dtype = lanes, dtype
        self.entry, self.rise, self.fall, self.exit = factors
        self.query, self.key, self.value = (self.tile(x) for x in inputs)
        if self.rise is not None:
            self.query = self.rescale(self.query, self.rise)
            self.key = self.rescale(self.key, self.fall)

    def tile(self, x: Tensor) -> Tensor:
        """[rows, H, C, D] -> [lanes, H / Hs * C, D]; heads that lanes share are repeated."""
        rows, heads = x.shape[:2]
        x = x.to(self.dtype)
        if rows * heads < self.lanes:
            x = x[:, :, None].expand(-1, -1, self.lanes // (rows * heads), -1, -1)
        return x.contiguous().view(self.lanes, -1, x.shape[-1])

    def rescale(self, x: Tensor, factor: Tensor) -> Tensor:
        """Rows [lanes, R * C, D] times [lanes, C]."""
        lanes, size = factor.shape
        return (x.view(lanes, -1, size, x.shape[2]) * factor[:, None, :, None]).view(x.shape)

    def mask(self, scores: Tensor) -> Tensor:
        """Zero what is later than its row in scores [lanes, R * C, C], in place."""
        size = self.key.shape[1]
        scores.view(-1, size, size).tril_()
        return scores

    def scores(self) -> Tensor:
        return self.mask(torch.bmm(self.query, self.key.mT))

    def enter(self, s: Tensor, z: Tensor | None) -> None:
        """Take a state [lanes, K, V] from before the chunk to where its keys refer to, in place."""
        _scale(self.entry, s, z)

    def leave(self, s: Tensor, z: Tensor | None) -> None:
        """Add the chunk to a state that entered it, and take it to the chunk's end, in place."""
        s.baddbmm_(self.key.mT, self.value)
        if z is not None:
            z += self.key.sum(1)
        _scale(self.exit, s, z)


def _write(out: Tensor, tiles: Tensor) -> None:
    """Tiles [lanes, H / Hs * C, D] into [rows, H, C, D]; what was repeated is summed."""
    lanes = tiles.shape[0] * tiles.shape[1] // out.shape[2]
    shared = lanes // (out.shape[0] * out.shape[1])
    if shared > 1:
        tiles = tiles.view(*out.shape[:2], shared, *out.shape[2:]).sum(2)
    out.copy_(tiles.view(out.shape))
