"""Linear attention in plain torch, for any device, fast on a CPU.

A sequence goes block by block, a block being some chunks, through batched matrix products over
chunks and heads: enough of them to be worth the calls, and few enough for what is computed to stay
in the cache. A batch goes in groups of rows; a packed row goes sequence by sequence.

Legend: a lane is one state head of one sequence; n chunks of C tokens in a block; R query heads of
a lane, which make one tile of R * C rows. Key heads that serve several lanes are copied by block.
"""

from collections.abc import Iterator
from functools import cached_property
from itertools import groupby, pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from supra.kernels import checks

# Tiles that a product should have: with fewer the calls cost more than the work
TILES = 32
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
    query, key, value = (x.to(dtype) for x in (query, key, value))
    query = query.unflatten(2, (heads, -1))
    if heads > kv_heads:
        key, value = (
            x[:, :, :, None].expand(-1, -1, -1, heads // kv_heads, -1).flatten(2, 3)
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
    output = outputs[0][:, None] if len(outputs) == 1 else torch.stack(outputs, 1)
    return output.to(output_dtype), (memory, normalizer)


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
        state = group.state(memory, normalizer)
        blocks = _Blocks(group, query, key, value, log_decay, chunk_size, state[0])
        outputs = blocks.split(output)
        weighed = blocks.split(weights) if normalized else None
        for i, block in enumerate(blocks):
            s, z = block.states(*state)
            scores = block.scores()
            out = torch.bmm(block.query, s).baddbmm_(scores, block.value)
            if normalized:
                weight = torch.bmm(block.query, z[..., None]) + scores.sum(-1, keepdim=True)
                block.write(weighed[i], weight)
                out /= weight + eps
            elif scale != 1:
                out *= scale
            block.write(outputs[i], out)
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
        state, d_end = _copies(*group.state(*start)), group.state(*d_state)
        blocks = _Blocks(group, query, key, value, log_decay, chunk_size, state[0])
        states = [block.states(*state) for block in blocks]
        given = [d_output, output, weights[..., None]] if normalized else [d_output]
        given = list(zip(*map(blocks.split, given), strict=True))
        found = list(zip(*map(blocks.split, d_inputs), strict=True))
        for i in reversed(range(len(states))):
            block = blocks[i]
            do, delta = _output_gradient(block, *given[i], scale=scale, eps=eps)
            gradients = _block_gradients(block, do, delta, *states.pop(), *d_end)
            for out, x in zip(found[i], gradients, strict=True):
                block.write(out, x)

    d_log_decay = None
    if log_decay is not None:
        d_log_decay = d_decays[..., 0] if log_decay.dim() == 3 else d_decays.sum((0, 1, 3))
        lost = log_decay < checks.LOWEST_LOG_DECAY
        d_log_decay = d_log_decay.masked_fill(lost, 0).to(log_decay.dtype)
    d_memory = None if memory is None else d_state[0]
    return *d_inputs[:3], d_log_decay, d_memory, None if normalizer is None else d_state[1]


def _output_gradient(
    block: "_Block",
    d_output: Tensor,
    output: Tensor | None = None,
    weights: Tensor | None = None,
    *,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the undivided output [tiles, R * C, V] and of the weights [tiles, R * C, 1]."""
    do = block.tile(d_output)
    if weights is None:
        return do.mul_(scale) if scale != 1 else do, None
    inverse = (block.tile(weights) + eps).reciprocal_()
    delta = (do * block.tile(output)).sum(-1, keepdim=True).mul_(inverse).neg_()
    return do.mul_(inverse), delta


def _block_gradients(
    block: "_Block",
    do: Tensor,
    delta: Tensor | None,
    s: Tensor,
    z: Tensor | None,
    d_end: Tensor,
    d_end_z: Tensor | None,
) -> tuple[Tensor, ...]:
    """dq, dk, dv and, where there is decay, d_log_decay of one block.

    s and z: what block.states() gave. d_end and d_end_z go from the gradient of the state after the
    block to that before it, in place. The gradient of a running sum of logs is q . dq of its row
    less k . dk of its column; that of a chunk's last one has <state, its gradient> added.
    """
    q, k, v = block.query, block.key, block.value
    ds = block.scan(torch.bmm(q.mT, do), d_end, back=True)
    d_scores = torch.bmm(do, v.mT)
    if delta is not None:
        d_scores += delta
    block.mask(d_scores)
    dq = torch.bmm(d_scores, k).baddbmm_(do, s.mT)
    dk = torch.bmm(v, ds.mT)
    dv = torch.bmm(block.scores().mT, do).baddbmm_(k, ds)
    if delta is not None:
        dz = block.scan(torch.bmm(q.mT, delta)[..., 0], d_end_z, back=True)
        dq.addcmul_(delta, z[:, None])
        dk += dz[:, None]
    last = None
    if block.rise is not None:
        last = (k * dk).sum((1, 2)) + (s * ds).sum((1, 2))
        if delta is not None:
            last += (z * dz).sum(1)
    dk.baddbmm_(d_scores.mT, q)
    if last is None:
        return dq, dk, dv
    d_sums = (q * dq).sum(-1).view(len(k), -1, k.shape[1]).sum(1) - (k * dk).sum(-1)
    d_sums[:, -1] += last
    d_log_decay = d_sums.flip(-1).cumsum(-1).flip(-1)[..., None]
    return block.rescale(dq, block.rise), block.rescale(dk, block.fall), dv, d_log_decay


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


class _Blocks:
    """The blocks of a group, each made when it is asked for."""

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
            if log_decay.dim() == 1:
                logs = log_decay.expand(group.rows.stop - group.rows.start, length, -1)
            else:
                logs = log_decay[group.rows, group.begin : group.end]
            logs = logs.double().clamp(min=checks.LOWEST_LOG_DECAY)
            # float64: a sum over a long text would cost float32 the digits of small differences
            sums = logs.cumsum(1).transpose(1, 2).flatten(0, 1)
            self.bounds = _narrow_bounds(sums, self.bounds)
            self.decay = self._factors(sums)
        self.spans = self._spans()
        self.inputs = list(zip(*map(self.split, (query, key, value)), strict=True))

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

    def __len__(self) -> int:
        return len(self.spans)

    def __iter__(self) -> Iterator["_Block"]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> "_Block":
        first, end = self.spans[i]
        factors = (None,) * 4
        if self.decay is not None:
            chunks, tokens = slice(first, end), slice(self.bounds[first], self.bounds[end])
            entry, rise, fall, exit_ = self.decay
            factors = entry[:, chunks], rise[:, tokens], fall[:, tokens], exit_[:, chunks]
        return _Block(self.inputs[i], factors, self.lanes, end - first, self.dtype)


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


class _Block:
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
