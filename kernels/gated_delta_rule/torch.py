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

from supra.kernels import checks, chunks, delta
from supra.kernels.chunks import Block
from supra.kernels.delta import DeltaTiles, Inputs

recurrent = delta.recurrent


def forward(x: Inputs) -> tuple[Tensor, Tensor]:
    """The same function in chunks."""
    return chunks.forward(_by_token(x), _Tiles)


def backward(x: Inputs, d_output: Tensor, d_end: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of all tensors."""
    *found, d_log_decay, d_state = chunks.backward(_by_token(x), 5, d_output, d_end, _Tiles)
    return *found, checks.d_log_decay(x.log_decay, d_log_decay), d_state


def _by_token(x: Inputs) -> Inputs:
    """With log_decay [B, T, Hkv] in float64."""
    if x.log_decay is None:
        return x._replace(log_decay=x.beta.new_zeros(x.beta.shape, dtype=torch.float64))
    log_decay = x.log_decay.double().clamp(min=checks.LOWEST_LOG_DECAY)
    return x._replace(log_decay=log_decay.expand(x.beta.shape))


class _Tiles(DeltaTiles):
    """Inputs as tiles, what carries a token's weight through its chunk, and T.

    query [rows, G * C, K], key [rows, C, K], value [rows, C, V]; beta, entering, leaving
    [rows, C, 1], whole [rows, 1, 1]: exp of the sums of logs; pairwise = D, overlap = D * (k . k),
    inverse = T, all [rows, C, C].
    """

    def __init__(self, x: Inputs, block: Block, keep: bool):
        self.block, self.dtype, self.kv_heads = block, checks.state_dtype(*x[:3]), x.key.shape[2]
        self.query = self.of_heads(x.query)
        self.key, self.value = (self.of_heads(y) for y in x[1:3])
        self.beta = self.of_heads(x.beta[..., None], clear=True)  # so padding writes nothing
        sums = block.gather(x.log_decay[..., None], clear=True).flatten(0, 1).cumsum(1)
        last = sums[:, -1:]
        self.entering, self.leaving, self.whole = (
            chunks.decay_of(y, self.dtype) for y in (sums, last - sums, last)
        )
        self.pairwise = chunks.pairwise_decay(sums, self.dtype)
        self.overlap = torch.bmm(self.key, self.key.mT).mul_(self.pairwise)
        scores = self.weigh(torch.bmm(self.query, self.key.mT), self.pairwise)
        self.scores = scores.mul_(self.beta.mT)
        query = self.query.clone() if keep else self.query  # gradients() needs it as it was
        self.entering_query = self.weigh(query, self.entering)
        self.writing = (self.beta * self.leaving) * self.key
        self.solve(self.overlap * self.beta.mT, self.entering * self.key)

    def of_heads(self, x: Tensor, clear: bool = False) -> Tensor:
        """[B, T, H, D] -> [rows, H / Hkv * C, D]; padded places hold some token, or zero."""
        tiles = self.block.gather(x, clear).to(self.dtype)
        return tiles.view(len(tiles) * self.kv_heads, -1, tiles.shape[3])

    def to_heads(self, tiles: Tensor) -> Tensor:
        """[rows, H / Hkv * C, D] -> [chunks, H, C, D]"""
        chunks, size = self.block.tokens.shape
        return tiles.view(chunks, -1, size, tiles.shape[2])

    def weigh(self, x: Tensor, factor: Tensor) -> Tensor:
        """x [rows, G * C, D] times factor [rows, C, D or 1], in place."""
        x.view(len(x), -1, factor.shape[1], x.shape[2]).mul_(factor[:, None])
        return x

    def gradients(
        self, d_out: Tensor, d_value: Tensor, errors: Tensor, states: Tensor, d_states: Tensor
    ) -> list[Tensor]:
        """Gradients of query, key, value, beta and log_decay, from those of backward().

        The gradient of a running sum of logs is o . do = q . dq of its row less v . dv of its
        column: scaling the state from a token on scales the outputs that follow, and is undone by
        scaling the values. That of the last one has <state, its gradient> added.
        """
        d_scores = self.weigh(torch.bmm(d_out, errors.mT), self.pairwise)
        d_key = torch.bmm(d_scores.mT, self.query)
        d_beta = (self.key * d_key).sum(-1)
        d_leaving = torch.bmm(errors, d_states.mT).mul_(self.leaving)
        d_left = (self.key * d_leaving).sum(-1)
        d_key.add_(d_leaving).mul_(self.beta)
        d_scores.mul_(self.beta.mT)
        d_query = self.weigh(torch.bmm(d_out, states.mT), self.entering)
        d_query.baddbmm_(d_scores, self.key)

        products = torch.bmm(d_value, errors.mT).tril_(-1)
        d_beta += d_left - (products * self.overlap).sum(-2)
        products.mul_(self.pairwise).mul_(self.beta.mT)
        d_key.baddbmm_(products + products.mT, self.key, alpha=-1)
        d_key.addcmul_(self.entering, torch.bmm(d_value, states.mT), value=-1)

        d_sums = (self.query * d_query).sum(-1).unflatten(1, (-1, self.key.shape[1])).sum(1)
        d_sums -= (self.value * d_value).sum(-1)
        carried = self.whole[:, 0, 0] * (states * d_states).sum((1, 2))
        d_sums[:, -1] += carried + (self.beta[..., 0] * d_left).sum(1)
        d_log_decay = d_sums.flip(1).cumsum(1).flip(1)
        found = d_query, d_key, d_value, d_beta[..., None], d_log_decay[..., None]
        return [self.to_heads(x) for x in found]
