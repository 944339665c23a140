"""The gated delta rule in plain torch, for any device; chunks as batched matrix products.

In a chunk of C tokens with the state S before it, G_i the running sum of log_decay and
D_ij = exp(G_i - G_j) for i >= j, the recurrence of api.py writes k_i u_i^T at token i, where
u_i = beta_i e_i is what the state lacks of v_i, the error

    e_i = v_i - exp(G_i) S^T k_i - sum_{j < i} D_ij (k_i . k_j) beta_j e_j

so e = T v - W S with T and W of delta.py, where A_ij = D_ij (k_i . k_j). With u in the place of the
values the rest is linear attention.

Legend: C chunk length, G query heads per key head, rows = chunks * Hkv. A tile is one chunk of one
head, [rows, C, D]; query tiles are [rows, G * C, D].
"""

import torch
from torch import Tensor

from supra.kernels import checks, delta
from supra.kernels.chunks import Layout
from supra.kernels.delta import DeltaTiles, Inputs


def recurrent(x: Inputs, in_place: bool) -> tuple[Tensor, Tensor]:
    """The recurrence of api.py, token by token: output and final state."""
    log_decay = x.log_decay
    if log_decay is not None and log_decay.dim() == 1:
        log_decay = log_decay.expand(x.beta.shape)
    return delta.recurrent(x, log_decay, in_place)


def forward(x: Inputs) -> tuple[Tensor, Tensor]:
    """The same function in chunks."""
    tiles = _Tiles(x)
    states, errors, end = tiles.scan()
    output = tiles.entering_query() @ states
    output.baddbmm_(tiles.within(tiles.query @ tiles.key.mT), errors.mul_(tiles.beta))
    output = tiles.layout.scatter(output.view(*tiles.heads, -1), x.query).to(x.value.dtype)
    return output, end[tiles.layout.place]


def backward(x: Inputs, d_output: Tensor, d_end: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of all tensors; T, the states and the errors are computed again.

    From dv = T^T (beta du) follow dB = -dv e^T and d(exp(G) k) = -dv S^T. The gradient of a running
    sum of logs is o . do = q . dq of its row less v . dv of its column: scaling the state from a
    token on scales the outputs that follow, and is undone by scaling the values.
    """
    tiles = _Tiles(x)
    layout = tiles.layout
    states, errors, end = tiles.scan()
    written = tiles.beta * errors

    d_out = layout.clear(layout.gather(d_output, errors.dtype)).view(*tiles.query.shape[:2], -1)
    d_scores = tiles.within(d_out @ written.mT)
    d_query = tiles.enter(d_out @ states.mT).baddbmm_(d_scores, tiles.key)
    d_written = tiles.within(tiles.query @ tiles.key.mT).mT @ d_out
    steps = tiles.entering_query().mT @ d_out
    d_states, d_start = tiles.scan_back(d_written, steps, d_end)

    d_value = tiles.inverse.mT @ (tiles.beta * d_written)
    products = (d_value @ errors.mT).tril_(-1)
    d_beta = (errors * d_written).sum(-1) - (products * tiles.overlap).sum(-2)
    products.mul_(tiles.pairwise).mul_(tiles.beta.mT)
    d_key = (d_scores.mT @ tiles.query).baddbmm_(products + products.mT, tiles.key, alpha=-1)
    d_key.addcmul_(tiles.entering, d_value @ states.mT, value=-1)
    d_key.addcmul_(tiles.leaving, written @ d_states.mT)

    carried = tiles.carried(states, end, d_states)
    d_log_decay = None if x.log_decay is None else tiles.d_log_decay(d_query, d_value, carried)
    d_query = layout.scatter(d_query.mul_(x.scale).view(*tiles.heads, -1), x.query)
    d_key, d_value, d_beta = (
        layout.scatter(y.view(*tiles.grid[:2], tiles.grid[3], -1), x.key)
        for y in (d_key, d_value, d_beta)
    )
    return (
        d_query.to(x.query.dtype),
        d_key.to(x.key.dtype),
        d_value.to(x.value.dtype),
        d_beta[..., 0].to(x.beta.dtype),
        d_log_decay,
        None if x.state is None else d_start[layout.place],
    )


class _Tiles(DeltaTiles):
    """Inputs as tiles, what carries a token's weight through its chunk, and T.

    query (with the scale) [rows, G * C, K], key [rows, C, K], value [rows, C, V],
    beta, entering, leaving [rows, C, 1], whole [rows, 1, 1]: exp of the sums of logs;
    pairwise = D, overlap = D * (k . k), inverse = T, all [rows, C, C].
    """

    def __init__(self, x: Inputs):
        self.layout = layout = Layout.of(x.query, x.cu_seqlens, x.chunk_size)
        self.inputs, dtype = x, checks.state_dtype(*x[:3])
        query, key, value = (layout.gather(y, dtype) for y in x[:3])
        beta = layout.clear(layout.gather(x.beta[..., None], dtype))  # so padding writes nothing
        chunks, kv_heads, size, width = key.shape
        self.heads = query.shape[:3]
        self.grid = (chunks, kv_heads, query.shape[1] // kv_heads, size)
        self.query = query.view(chunks * kv_heads, -1, width).mul_(x.scale)
        self.key, self.value, self.beta = (x.flatten(0, 1) for x in (key, value, beta))

        logs = query.new_zeros(kv_heads) if x.log_decay is None else x.log_decay
        sums = layout.decay_sums(logs.double().clamp(min=checks.LOWEST_LOG_DECAY)).flatten(0, 1)
        last = sums[:, -1:]
        self.entering = sums.to(dtype).exp()[..., None]
        self.leaving = (last - sums).to(dtype).exp()[..., None]
        self.whole = last.to(dtype).exp()[..., None]
        self.pairwise = _pairwise(sums, dtype)
        self.overlap = (self.key @ self.key.mT).mul_(self.pairwise)
        self.departing = self.leaving * self.key
        self.solve(self.overlap, self.entering * self.key)

    def within(self, scores: Tensor) -> Tensor:
        """Scale scores [rows, G * C, C] in place by D, zero above the diagonal."""
        scores.view(-1, self.grid[2], *self.pairwise.shape[1:]).mul_(self.pairwise[:, None])
        return scores

    def enter(self, x: Tensor) -> Tensor:
        """Scale x [rows, G * C, D] in place by the decay since the chunk began."""
        x.view(-1, *self.grid[2:], x.shape[2]).mul_(self.entering[:, None])
        return x

    def entering_query(self) -> Tensor:
        return self.enter(self.query.clone())

    def carried(self, states: Tensor, end: Tensor, d_states: Tensor) -> Tensor:
        """Products of the states after every chunk with their gradients, [chunks, Hkv]."""
        after, found = end.flatten(0, 1).clone(), states.new_empty(len(states))
        for at, count in reversed(self.slices()):
            found[at] = (after[:count] * d_states[at]).sum((1, 2))
            after[:count] = states[at]
        return found.view(self.grid[:2])

    def d_log_decay(self, d_query: Tensor, d_value: Tensor, carried: Tensor) -> Tensor:
        """Gradient of log_decay, from that of its running sums in each chunk [chunks, Hkv, C]."""
        layout, log_decay = self.layout, self.inputs.log_decay
        d_sums = (self.query * d_query).sum(-1).view(*self.grid).sum(2)
        d_sums -= (self.value * d_value).sum(-1).view_as(d_sums)
        d_sums[..., -1] += carried
        d_steps = d_sums.flip(-1).cumsum(-1).flip(-1)
        if log_decay.dim() == 3:
            found = layout.scatter(d_steps[..., None], log_decay)[..., 0]
        else:
            if layout.padded is not None:
                d_steps = d_steps.masked_fill(layout.padded[:, None], 0)
            found = d_steps.sum((0, 2))
        return found.masked_fill(log_decay < checks.LOWEST_LOG_DECAY, 0).to(log_decay.dtype)


def _pairwise(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """[rows, C] -> D [rows, C, C], decay from column to row; the log is masked before exp.

    The sums are float64: with resets among them float32 would keep 3e-5 of their differences. Masks
    are zeros: exp takes ten times as long for -inf.
    """
    logs = (sums[:, :, None] - sums[:, None, :]).to(dtype)
    return logs.tril_().exp_().tril_()
