"""Linear attention in plain torch, for any device; chunks as batched matrix products.

Legend: C chunk length, G query heads per key head, R query heads per state head (1 or G). A tile is
one chunk of one head, [C, D]. States are kept transposed, [N, H, V, K], so that the products need
no copy; with a normalizer a column of ones is added to the values (V + 1 in all), which makes the
normalizer one more row of the state and its gradient one more column.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from supra.kernels import checks
from supra.kernels.packing import Layout

# exp(-104) is 0 in float32; a lower sum of logs would only cost the differences their digits
LOWEST_LOG_DECAY = -104.0

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
    start = _start(*state, query, key, value, log_decay, normalized, len(query))
    memory, normalizer = start
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
    layout = Layout.of(checks.bounds(cu_seqlens, *query.shape[:2]), chunk_size, query.device)
    start = _start(memory, normalizer, query, key, value, log_decay, normalized, len(layout.order))
    tiles = _Tiles(layout, query, key, value, log_decay, _transposed(*start)[layout.order])
    states, end = tiles.states()
    out = tiles.enter(torch.bmm(tiles.by_state, states.flatten(0, 1).mT))
    out = out.view(*tiles.query.shape[:2], -1).baddbmm_(tiles.scores(), tiles.value)
    weights = None
    if normalized:
        weights = layout.scatter(out[..., -1:], query)[..., 0]
        out = out[..., :-1] / (out[..., -1:] + eps)
    elif scale != 1:
        out *= scale
    output = layout.scatter(out, query).to(value.dtype)
    end = end[layout.place].mT
    if not normalized:
        return output, end.contiguous(), None, None
    return output, end[..., :-1].contiguous(), end[..., -1].contiguous(), weights


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

    States and scores are computed again. The gradient of a running sum of logs follows from
    q . dq = o . do of its row and from k . dk = v . dv of its column, which need no pass over K.
    """
    layout = Layout.of(checks.bounds(cu_seqlens, *query.shape[:2]), chunk_size, query.device)
    inputs = (query, key, value, log_decay, normalized, len(layout.order))
    start = _transposed(*_start(memory, normalizer, *inputs))[layout.order]
    d_end = _transposed(*_start(d_memory, d_normalizer, *inputs))[layout.order]
    tiles = _Tiles(layout, query, key, value, log_decay, start)
    states, _ = tiles.states()
    dtype = start.dtype

    # d_out: gradient of the undivided output; along: its product with that output
    d_out = layout.clear(layout.gather(d_output, dtype)).view(*tiles.query.shape[:2], -1)
    along = (d_out * layout.gather(output, dtype).view_as(d_out)).sum(-1, keepdim=True)
    if normalized:
        inverse = (layout.gather(weights[..., None], dtype).view_as(along) + eps).reciprocal_()
        along *= inverse
        d_out = torch.cat((d_out * inverse, -along), -1)
        along *= eps
    elif scale != 1:
        d_out *= scale

    scores = tiles.scores()
    d_scores = torch.bmm(d_out, tiles.value.mT)
    d_sums = None
    if log_decay is not None:
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
    if log_decay is None:
        d_value += d_weighted
    else:
        d_weighted = d_weighted.unflatten(2, (-1, d_value.shape[2])).mul_(tiles.leaving)
        d_value += d_weighted.sum(2)
        leaving = (d_weighted * tiles.value[:, :, None]).sum(-1).mT.reshape(d_sums.shape)
        carried = tiles.whole[..., 0, 0] * (states * d_states).sum((2, 3))
        d_sums -= leaving
        d_sums[..., -1] += leaving.sum(-1) + carried

    d_query = layout.scatter(d_query, query).to(query.dtype)
    d_key = layout.scatter(d_key, key).to(key.dtype)
    d_value = layout.scatter(d_value[..., : value.shape[3]], value).to(value.dtype)
    d_log_decay = None if log_decay is None else _d_log_decay(layout, d_sums, log_decay)
    d_start = d_start[layout.place].mT
    d_memory = None if memory is None else d_start[..., : value.shape[3]].contiguous()
    d_normalizer = None if normalizer is None else d_start[..., -1].contiguous()
    return d_query, d_key, d_value, d_log_decay, d_memory, d_normalizer


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


def _transposed(memory: Tensor, normalizer: Tensor | None) -> Tensor:
    """[N, H, V, K], with the normalizer as one more row."""
    return memory.mT if normalizer is None else torch.cat((memory.mT, normalizer[:, :, None]), 2)


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
        log_decay: Tensor | None,
        start: Tensor,
    ):
        dtype, heads = start.dtype, start.shape[1]
        normalized = start.shape[2] > value.shape[3]
        query, key, value = (layout.gather(x, dtype) for x in (query, key, value))
        if normalized:
            value = F.pad(value, (0, 1), value=1.0)
        chunks, kv_heads, size, width = key.shape
        self.query = query.view(chunks * kv_heads, -1, width)
        self.by_state = query.view(chunks * heads, -1, width)
        self.key = key.flatten(0, 1)
        self.value = self.weighted = layout.clear(value).flatten(0, 1)
        self.grid = (chunks, heads, query.shape[1] // heads, size)
        self.start, self.levels, self.whole = start, layout.levels, None
        if log_decay is None:
            self.within = query.new_ones(size, size).tril_()
        else:
            log_decay = log_decay.double().clamp(min=LOWEST_LOG_DECAY)
            sums = layout.decay_sums(log_decay)
            last = sums[..., -1:]
            if log_decay.dim() == 1:  # the same [C, C] factors in every chunk, padded or not
                steps = torch.arange(1, size + 1, device=sums.device)
                self.within = _pairwise((log_decay[:, None] * steps)[None], dtype)
            else:
                self.within = _pairwise(sums, dtype)
            self.entering = sums.to(dtype).exp()[:, :, None, :, None]
            leaving = (last - sums).to(dtype).exp().view(chunks * kv_heads, -1, size)
            self.leaving = leaving.mT[..., None]
            self.whole = last.to(dtype).exp()[..., None]
            self.weighted = (self.value[:, :, None] * self.leaving).flatten(2)

    def scores(self) -> Tensor:
        """[chunks * Hkv, G * C, C]"""
        scores = torch.bmm(self.query, self.key.mT)
        scores.view(*self.grid, -1).mul_(self.within)
        return scores

    def states(self) -> tuple[Tensor, Tensor]:
        """States before every chunk, [chunks, Hs, V, K], and after the last of every sequence."""
        steps = torch.bmm(self.weighted.mT, self.key).view(*self.grid[:2], -1, self.key.shape[2])
        return self.scan(steps, self.start, self.levels)

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


def _pairwise(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """[n, H, C] -> [n, H, 1, C, C], decay from column to row; the log is masked before exp.

    The sums are float64: with resets among them float32 would keep 3e-5 of their differences.
    """
    logs = (sums[..., :, None] - sums[..., None, :]).to(dtype)
    future = torch.ones(logs.shape[-2:], dtype=torch.bool, device=sums.device).triu_(1)
    return logs.masked_fill_(future, -torch.inf).exp_()[:, :, None]


def _d_log_decay(layout: Layout, d_sums: Tensor, log_decay: Tensor) -> Tensor:
    """Gradient of log_decay from that of its running sums in each chunk [chunks, H, C]."""
    d_steps = d_sums.flip(-1).cumsum(-1).flip(-1)
    if log_decay.dim() == 3:
        found = layout.scatter(d_steps[..., None], log_decay)[..., 0]
    else:
        if layout.padded is not None:
            d_steps = d_steps.masked_fill(layout.padded[:, None], 0)
        found = d_steps.sum((0, 2))
    return found.masked_fill(log_decay < LOWEST_LOG_DECAY, 0).to(log_decay.dtype)
