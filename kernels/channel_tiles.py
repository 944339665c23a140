"""Chunks of a recurrence with a decay per key channel, in plain torch: scores and gradients.

The weight of token j in the output of token i is a product of the decays between them, one for each
channel, so it cannot be taken out of the scores as a matrix, and written as exp(G_i) / exp(G_j) it
overflows. Here a chunk is a binary tree: two neighbouring blocks of m tokens become one of 2m. The
later block reads the earlier one through the boundary between them, with

    (q_i * decay from the boundary to i) . (k_j * decay from j to the boundary)

so that every factor is a product of decays, never a quotient: nothing overflows, and a decay of 0
is exact. One level scales each row once and multiplies matrices; there are log2(C) levels.

Legend: C chunk length, a power of two; G query heads per key head, the inner index of the rows of a
tile of queries; n chunks times Hkv.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from supra.kernels import checks
from supra.kernels.chunks import Block

# products with denormal numbers take 200 times as long, and what is below 1e-30 is lost in any sum
NEGLIGIBLE = 1e-30


class ChannelTiles:
    """Inputs as tiles: query [n, C, G, K], key and decay [n, C, K].

    After climb(): entering [n, C * G, K], queries times the decay since their chunk began; leaving
    [n, C, K], keys times the decay until it ends; whole [n, 1, K], the decay of the chunk.
    """

    def __init__(self, x: Any, block: Block, query: Tensor, bonus: Tensor | None = None):
        """x: has query, key, value and log_decay, contiguous.

        query: [B, T, G * Hkv, K], what reads the states. bonus: [G * Hkv, K], the weight of a token
        in its own output, which then reads the state before its decay.
        """
        self.block, self.dtype = block, checks.state_dtype(*x[:3])
        self.tokens = block.tokens.shape[1]
        self.padding = (1 << (self.tokens - 1).bit_length()) - self.tokens
        self.kv_heads = x.key.shape[2]
        self.query = self.of_heads(query).unflatten(1, (self.tokens + self.padding, -1))
        self.key = self.of_kv_heads(x.key)
        self.decay = self.of_kv_heads(x.log_decay, clear=True).exp_()
        torch.hardshrink(self.decay, NEGLIGIBLE, out=self.decay)
        self.bonus = None
        if bonus is not None:
            bonus = bonus.to(self.dtype).unflatten(0, (self.kv_heads, -1))
            self.bonus = bonus.repeat(len(block.tokens), 1, 1)[:, None]  # [n, 1, G, K]

    def climb(self, keep: bool = False) -> tuple[Tensor, list["Level"]]:
        """Scores [n, C * G, C] of pairs of tokens, zero in the future, and what each level used."""
        query = self.query * self.decay[:, :, None] if self.bonus is None else self.query.clone()
        self.entering, self.leaving = query.flatten(1, 2), self.key.clone()
        count, length, _ = self.key.shape
        scores = self.key.new_zeros(count, self.entering.shape[1], length)
        own = self.query if self.bonus is None else self.query * self.bonus
        self.own(scores).copy_((own @ self.key[..., None])[..., 0])
        totals, levels, size = self.decay, [], 1
        while size < length:
            level = Level.between(size, self.entering, self.leaving, totals)
            block = torch.bmm(level.later, level.earlier.mT)
            level.of(scores).copy_(block.view(count, -1, *block.shape[1:]))
            if keep:
                kept = level._replace(later=level.later.clone(), earlier=level.earlier.clone())
                levels.append(kept)
            totals = _decay(level.row_decay.clone(), level.column_decay)
            _decay(level.later, level.row_decay)
            _decay(level.earlier, level.column_decay)
            totals = totals.view(count, -1, self.key.shape[2])
            size *= 2
        self.whole = totals
        return scores, levels

    def gradients(
        self,
        levels: list["Level"],
        value: Tensor,
        d_out: Tensor,
        d_scores: Tensor,
        states: Tensor,
        d_states: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Gradients of query [n, C, G, K], key and log_decay [n, C, K], and of bonus.

        levels: what climb() kept. value: [n, C, V], what the keys wrote; d_out: [n, C * G, V].
        states [n, K, V]: before every chunk; d_states: gradients of those after it.

        The gradient of a decay is collected on the way down the tree, from products that this decay
        is in. The usual difference of running sums of q dq and k dk cancels where decay is strong.
        """
        d_query, d_key = torch.bmm(d_out, states.mT), torch.bmm(value, d_states.mT)
        d_totals = (states * d_states).sum(2)
        d_totals = _descend(levels, d_scores, d_query, d_key, d_totals)
        d_query, d_decay = d_query.view_as(self.query), d_totals.view_as(self.decay)
        if self.bonus is None:  # an output reads the state after its own token's decay
            d_decay = d_decay + (self.query * d_query).sum(2)
            d_query *= self.decay[:, :, None]
        d_bonus = self._own_backward(d_scores, d_query, d_key)
        return d_query, d_key, d_decay * self.decay, d_bonus

    def of_heads(self, x: Tensor, clear: bool = False) -> Tensor:
        """[B, T, Hq, D] -> [n, C * G, D]; padded places hold some token, or zero with clear."""
        tiles = self._gather(x, clear).unflatten(1, (self.kv_heads, -1))
        return tiles.transpose(2, 3).reshape(-1, tiles.shape[2] * tiles.shape[3], x.shape[3])

    def to_heads(self, tiles: Tensor) -> Tensor:
        """[n, C * G, D] -> [chunks, Hq, C, D]"""
        tiles = tiles.unflatten(1, (self.tokens + self.padding, -1))[:, : self.tokens]
        return tiles.transpose(1, 2).unflatten(0, (-1, self.kv_heads)).flatten(1, 2)

    def to_kv_heads(self, tiles: Tensor) -> Tensor:
        """[n, C, D] -> [chunks, Hkv, C, D]"""
        return tiles[:, : self.tokens].unflatten(0, (-1, self.kv_heads))

    def of_kv_heads(self, x: Tensor, clear: bool = False) -> Tensor:
        """[B, T, Hkv, D] -> [n, C, D]"""
        return self._gather(x, clear).flatten(0, 1)

    def _gather(self, x: Tensor, clear: bool) -> Tensor:
        tiles = self.block.gather(x, clear).to(self.dtype)
        return F.pad(tiles, (0, 0, 0, self.padding)) if self.padding else tiles

    def _own_backward(self, d_scores: Tensor, d_query: Tensor, d_key: Tensor) -> Tensor | None:
        """Add what the tokens' own scores give to d_query and d_key; gradient of bonus [Hq, K]."""
        d_own = self.own(d_scores)[..., None]
        if self.bonus is None:
            d_query.addcmul_(d_own, self.key[:, :, None])
            d_key += (d_own * self.query).sum(2)
            return None
        d_query.addcmul_(d_own * self.bonus, self.key[:, :, None])
        d_own = d_own * self.query
        d_key += (d_own * self.bonus).sum(2)
        d_bonus = (d_own * self.key[:, :, None]).sum(1)
        return d_bonus.unflatten(0, (-1, self.kv_heads)).sum(0).flatten(0, 1)

    def own(self, scores: Tensor) -> Tensor:
        """View of the scores of every token with itself, [n, C, G]."""
        count, rows, length = scores.shape
        view = scores.view(count, length, rows // length, length)
        return view.diagonal(dim1=1, dim2=3).movedim(-1, 1)


class Level(NamedTuple):
    """Where pairs of neighbouring blocks of `size` tokens meet.

    later [pairs, size * G, K], earlier [pairs, size, K]: rows of queries and keys, decayed to the
    boundary; row_decay [pairs, 1, K] and column_decay: of the whole other block, which they pass to
    get into or out of both.
    """

    size: int
    later: Tensor
    earlier: Tensor
    row_decay: Tensor
    column_decay: Tensor

    @staticmethod
    def between(size: int, rows: Tensor, columns: Tensor, totals: Tensor) -> "Level":
        """Views into rows [n, C * G, K] and columns [n, C, K]; totals [n, C / size, K]."""
        count, length, width = columns.shape
        pairs = count * length // (2 * size)
        totals = totals.view(pairs, 2, 1, width)
        later = rows.view(pairs, 2, -1, width)[:, 1]
        earlier = columns.view(pairs, 2, size, width)[:, 0]
        return Level(size, later, earlier, totals[:, 0], totals[:, 1])

    def halves(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """The same views into other tensors."""
        shape = (len(self.later), 2, -1, columns.shape[2])
        return rows.view(shape)[:, 1], columns.view(shape)[:, 0]

    def totals_backward(self, d_totals: Tensor, d_rows: Tensor, d_columns: Tensor) -> Tensor:
        """[2 * pairs, K] from the gradients of the pairs' totals and of rows and columns above."""
        d_totals = d_totals.view(len(self.later), 1, -1)
        d_first = (d_rows * self.later).sum(1, keepdim=True).addcmul_(d_totals, self.column_decay)
        d_second = (d_columns * self.earlier).sum(1, keepdim=True)
        return torch.cat((d_first, d_second.addcmul_(d_totals, self.row_decay)), 1)

    def of(self, scores: Tensor) -> Tensor:
        """View of scores [n, C * G, C] as [n, C / 2 size, size * G, size], this level's blocks."""
        count, _, length = scores.shape
        blocks = length // (2 * self.size)
        view = scores.view(count, blocks, 2, -1, blocks, 2, self.size)
        return view[:, :, 1, :, :, 0].diagonal(dim1=1, dim2=3).movedim(-1, 1)


def _descend(
    levels: list["Level"], d_scores: Tensor, d_entering: Tensor, d_leaving: Tensor, d_totals: Tensor
) -> Tensor:
    """Gradients of the decays of all tokens [n * C, K], from that of the chunks' decays.

    d_entering and d_leaving become the gradients of the rows of queries and keys, in place.
    """
    for level in reversed(levels):
        block = level.of(d_scores).flatten(0, 1)
        rows, columns = level.halves(d_entering, d_leaving)
        d_totals = level.totals_backward(d_totals, rows, columns)
        _decay(rows, level.row_decay).add_(_product(block, level.earlier))
        _decay(columns, level.column_decay).add_(_product(block.mT, level.later))
    return d_totals


def _decay(x: Tensor, factor: Tensor) -> Tensor:
    """x * factor in place."""
    return torch.hardshrink(x.mul_(factor), NEGLIGIBLE, out=x)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b; on a CPU torch.bmm takes 3 to 8 times as long for the smallest matrices."""
    return torch.bmm(a, b) if a.shape[2] > 2 else (a[..., None] * b[:, None]).sum(2)
