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

from supra.kernels import chunks, delta
from supra.kernels.channel_tiles import ChannelTiles
from supra.kernels.chunks import Block
from supra.kernels.delta import DeltaTiles, Inputs

recurrent = delta.recurrent


def forward(x: Inputs) -> tuple[Tensor, Tensor]:
    """The same function in chunks."""
    return chunks.forward(x, _Tiles)


def backward(x: Inputs, d_output: Tensor, d_end: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of all tensors."""
    return chunks.backward(x, 5, d_output, d_end, _Tiles)


class _Tiles(ChannelTiles, DeltaTiles):
    """The keys as the last query head; value [n, C, V], beta [n, C, 1].

    weights [n, C * (G + 1), C]: scores without beta, those of the keys being A; entering
    [n, C * (G + 1), K].
    """

    def __init__(self, x: Inputs, block: Block, keep: bool):
        heads = x.key.shape[2]
        readers = torch.cat((x.query.unflatten(2, (heads, -1)), x.key[:, :, :, None]), 3)
        super().__init__(x, block, readers.flatten(2, 3))
        self.value = self.of_kv_heads(x.value)
        self.beta = self.of_kv_heads(x.beta[..., None], clear=True)  # so padding writes nothing
        self.weights, self.levels = self.climb(keep)
        self.own(self.weights)[..., -1] = 0  # a key does not read what its own token writes
        self.scores, overlap = self.split(self.weights * self.beta.mT)
        self.entering_query, entering_key = self.split(self.entering)
        self.writing, self.whole = self.beta * self.leaving, self.whole.mT
        self.solve(overlap, entering_key)

    def gradients(
        self, d_out: Tensor, d_value: Tensor, errors: Tensor, states: Tensor, d_states: Tensor
    ) -> list[Tensor]:
        """Gradients of query, key, value, beta and log_decay, from those of backward()."""
        d_out, written = self.join(d_out, -d_value), self.beta * errors
        d_scores = torch.bmm(d_out, written.mT)
        self.own(d_scores)[..., -1] = 0
        d_written = torch.bmm(self.leaving, d_states).baddbmm_(self.weights.mT, d_out)
        d_query, d_key, d_log_decay, _ = super().gradients(
            self.levels, written, d_out, d_scores, states, d_states
        )
        d_key += d_query[:, :, -1]
        d_beta = (errors * d_written).sum(-1, True)
        found = d_key, d_value, d_beta, d_log_decay
        return [self.to_heads(d_query[:, :, :-1].flatten(1, 2)), *map(self.to_kv_heads, found)]

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of queries [n, C * G, D] and of keys [n, C, D]."""
        heads = x.unflatten(1, (self.key.shape[1], -1))
        return heads[:, :, :-1].flatten(1, 2), heads[:, :, -1]

    def join(self, of_queries: Tensor, of_keys: Tensor) -> Tensor:
        """What split() took apart."""
        heads = of_queries.unflatten(1, (self.key.shape[1], -1))
        return torch.cat((heads, of_keys[:, :, None]), 2).flatten(1, 2)
