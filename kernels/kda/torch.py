"""Kimi Delta Attention in plain torch, for any device; chunks as batched matrix products.

In a chunk with the state S before it and G_i the running sums of log_decay per channel, the
recurrence of api.py writes k_i u_i^T at token i, where u_i = beta_i e_i and the error is

    e_i = v_i - (exp(G_i) k_i)^T S - sum_{j < i} A_ij u_j,   A_ij = sum_c k_ic k_jc exp(G_ic - G_jc)

so e = T v - W S with T and W of delta.py. The keys read what was written before them as queries do:
here they are one more query head of every key head, A their scores, and -dv the gradient of what
they read. With u in the place of the values the rest is gated linear attention (channel_tiles.py).

Legend: C chunk length, G query heads per key head, rows n = chunks * Hkv.
"""

import torch
from torch import Tensor

from supra.kernels import delta
from supra.kernels.channel_tiles import ChannelTiles
from supra.kernels.delta import DeltaTiles, Inputs


def recurrent(x: Inputs, in_place: bool) -> tuple[Tensor, Tensor]:
    """The recurrence of api.py, token by token: output and final state."""
    return delta.recurrent(x, x.log_decay, in_place)


def forward(x: Inputs) -> tuple[Tensor, Tensor]:
    """The same function in chunks."""
    tiles = _Tiles(x)
    states, errors, end = tiles.scan()
    output = tiles.entering_query @ states
    output.baddbmm_(tiles.scores, errors.mul_(tiles.beta))
    output = tiles.to_heads(output.mul_(x.scale), x.query)
    return output.to(x.value.dtype), end[tiles.layout.place]


def backward(x: Inputs, d_output: Tensor, d_end: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of all tensors; T, the states and the errors are computed again.

    From dv = T^T (beta du) follow dA = -dv u^T and d(exp(G) k) = -dv S^T.
    """
    tiles = _Tiles(x, keep=True)
    states, errors, _ = tiles.scan()
    written = tiles.beta * errors
    d_out = tiles.of_heads(d_output, clear=True).mul_(x.scale)

    d_written, steps = tiles.scores.mT @ d_out, tiles.entering_query.mT @ d_out
    d_states, d_start = tiles.scan_back(d_written, steps, d_end)
    d_value = tiles.inverse.mT @ (tiles.beta * d_written)
    d_written.baddbmm_(tiles.overlap.tril(-1).mT, d_value, alpha=-1)

    d_out = tiles.join(d_out, -d_value)
    d_scores = d_out @ written.mT
    tiles.own(d_scores)[..., -1] = 0  # a key does not read what its own token writes
    d_query, d_key, d_log_decay, _ = tiles.gradients(
        tiles.levels, written, d_out, d_scores, states.mT, d_states.mT
    )
    d_query, d_reading = d_query[:, :, :-1], d_query[:, :, -1]
    d_key, d_value, d_beta, d_log_decay = (
        tiles.to_kv_heads(y, x.key)
        for y in (d_key + d_reading, d_value, (errors * d_written).sum(-1, True), d_log_decay)
    )
    return (
        tiles.to_heads(d_query.flatten(1, 2), x.query).to(x.query.dtype),
        d_key.to(x.key.dtype),
        d_value.to(x.value.dtype),
        d_beta[..., 0].to(x.beta.dtype),
        d_log_decay.to(x.log_decay.dtype),
        None if x.state is None else d_start[tiles.layout.place],
    )


class _Tiles(ChannelTiles, DeltaTiles):
    """The keys as the last query head; value [n, C, V], beta [n, C, 1].

    scores [n, C * G, C] and entering_query [n, C * G, K] of the queries alone; overlap = A on and
    below the diagonal.
    """

    def __init__(self, x: Inputs, keep: bool = False):
        self.inputs, heads = x, x.key.shape[2]
        readers = torch.cat((x.query.unflatten(2, (heads, -1)), x.key[:, :, :, None]), 3)
        super().__init__(x, readers.flatten(2, 3))
        self.value = self.of_kv_heads(x.value)
        self.beta = self.of_kv_heads(x.beta[..., None], clear=True)  # so padding writes nothing
        scores, self.levels = self.climb(keep)
        self.scores, self.overlap = self.split(scores)
        self.entering_query, entering_key = self.split(self.entering)
        self.departing, self.whole = self.leaving, self.whole.mT
        self.solve(self.overlap, entering_key)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of queries [n, C * G, D] and of keys [n, C, D]."""
        heads = x.unflatten(1, (self.key.shape[1], -1))
        return heads[:, :, :-1].flatten(1, 2), heads[:, :, -1]

    def join(self, of_queries: Tensor, of_keys: Tensor) -> Tensor:
        """What split() took apart."""
        heads = of_queries.unflatten(1, (self.key.shape[1], -1))
        return torch.cat((heads, of_keys[:, :, None]), 2).flatten(1, 2)
