"""Rows that lie on several ranks. Each rank has a part of the tokens of every row.

A recurrence that is linear in its state changes a state S over the tokens of a part to A S + b. So
all ranks compute A and b at the same time and exchange them, and each follows S over the ranks
before. LASP-2 (Sun et al. 2025, arXiv 2502.07563) does so for linear attention without decay, where
A = 1. Here A is a product of decays, or of matrices for the delta rule.

What needs tokens and not their sums gets them from the ranks on which they lie: the last ones
before the part (short convolutions, windows), the first ones of the document (sinks), or all of
them (softmax attention).

Notation: R ranks, B rows, T tokens of each row on this rank, L tokens on all ranks. N sequences:
B, or the documents packed in the rows of this rank.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from supra.mixers.padding import pick, tokens_first
from supra.mixers.ranks import Ranks, gather, state_before, sum_of_own


@dataclass(frozen=True)
class RowPart:
    """The part of the rows of one call that this rank has.

    Tokens before the part count if they are in the document that goes on in it; for padded rows,
    that is the whole row.
    """

    ranks: Ranks
    lengths: tuple[int, ...]  # tokens of each row on each rank, >= 1
    valid: Tensor  # bool [B, L], False where padded
    documents: Tensor  # int [B, L], the number of each token's document in its row, from 0

    @property
    def start(self) -> int:
        """The number of tokens of each row on the ranks before."""
        return self._starts[self.ranks.rank]

    @property
    def tokens(self) -> int:
        """T."""
        return self.lengths[self.ranks.rank]

    @property
    def stop(self) -> int:
        """The number of tokens of each row up to the last one of this rank."""
        return self.start + self.tokens

    @property
    def length(self) -> Tensor:
        """The number of tokens before the part, of the document that goes on in it: int [B]."""
        first, end = self._before
        return (end - first)[self.ranks.rank]

    def state_before(
        self, transition: Tensor, state: Tensor, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """The states [N, H, K, V] before the sequences of this rank.

        transition: of whole rows, [B, H, K, K], or [B, H, K or 1, 1] for a factor per row of S.
        state: after the sequences [N, H, K, V], from empty states.
        """
        on, last = self.length > 0, self.stop - 1
        passes = on & (self.documents[:, self.start] == self.documents[:, last])
        transition = transition.to(state.dtype).masked_fill(~_beside(passes, transition), 0)
        before = state_before(transition, self.of_rows(state, cu_seqlens), self.ranks)
        return self.of_sequences(before.masked_fill(~_beside(on, before), 0), cu_seqlens)

    def last_tokens(self, x: Tensor, count: int) -> Tensor:
        """Of x [B, T, …] on all ranks, the last tokens before the part: [B, count, …], the newest
        last, and zeros in front of the first one."""
        first, end = self._before
        at = end[..., None] - count + torch.arange(count, device=end.device)
        return self._from_ranks(x, at, at >= first[..., None])

    def first_tokens(self, x: Tensor, count: int) -> Tensor:
        """Of x [B, T, …] on all ranks, the first tokens of the document, as far as they are before
        the part: [B, count, …], and zeros for the others."""
        first, end = self._before
        at = first[..., None] + torch.arange(count, device=end.device)
        return self._from_ranks(x, at, at < end[..., None])

    def all_tokens(self, x: Tensor) -> Tensor:
        """x [B, T, …] of the ranks before, of all documents and padding: [B, start, …]."""
        missing = max(self.lengths) - x.shape[1]
        x = torch.nn.functional.pad(x, (0, 0) * (x.dim() - 2) + (0, missing))
        # nothing is taken from later ranks, but all go back through the exchange
        taken = [n if rank < self.ranks.rank else 0 for rank, n in enumerate(self.lengths)]
        parts = zip(gather(x, self.ranks), taken, strict=True)
        return torch.cat([x[:, :count] for x, count in parts], dim=1)

    def of_rows(self, state: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """The states [B, …] after the last sequence of each row, from those [N, …] of all."""
        if cu_seqlens is None:
            return state
        rows = torch.arange(1, len(self.valid) + 1, device=cu_seqlens.device)
        ends = (rows * self.tokens).to(cu_seqlens.dtype)
        return state[torch.searchsorted(cu_seqlens, ends) - 1]

    def of_sequences(self, state: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """States [B, …] before the first sequence of each row, and zeros before the others:
        [N, …]."""
        if cu_seqlens is None:
            return state
        empty = state.new_zeros(len(cu_seqlens) - 1, *state.shape[1:])
        return empty.index_copy(0, self.first_sequences(cu_seqlens), state)

    def first_sequences(self, cu_seqlens: Tensor) -> Tensor:
        """The first sequence of each row: int [B]."""
        starts = torch.arange(len(self.valid), device=cu_seqlens.device) * self.tokens
        return torch.searchsorted(cu_seqlens, starts.to(cu_seqlens.dtype), right=True) - 1

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *accumulate(self.lengths)][:-1]

    @cached_property
    def _order(self) -> Tensor:
        """Where the tokens of each row are, then its padding: int [B, L]."""
        return tokens_first(self.valid)

    @cached_property
    def _before(self) -> tuple[Tensor, Tensor]:
        """For each rank, the first token of the document that goes on there, and the end of the
        tokens before it, counted without padding: int [R, B] each."""
        documents = self.documents[:, self._starts].T[..., None]
        first = (self.valid & (self.documents < documents)).sum(-1)
        end = torch.stack([self.valid[:, :start].sum(1) for start in self._starts])
        return first, end

    def _from_ranks(self, x: Tensor, at: Tensor, known: Tensor) -> Tensor:
        """For each rank, the tokens `at` [R, B, n] of its rows, counted without padding, from the
        ranks on which they lie; zeros where not `known`. Returns those for this rank, [B, n, …]."""
        count, tokens = at.shape[2], x.shape[1]
        at, known = (y.transpose(0, 1).flatten(1) for y in (at, known))  # [B, R · n]
        place = self._order.gather(1, at.clamp(0, self._order.shape[1] - 1)) - self.start
        here = known & (place >= 0) & (place < tokens)
        found = pick(x, place.clamp(0, tokens - 1))
        found = found.masked_fill(~_beside(here, found), 0).unflatten(1, (self.ranks.size, count))
        return sum_of_own(found.transpose(0, 1), self.ranks)


def _beside(mask: Tensor, x: Tensor) -> Tensor:
    """A mask [B] or [B, T] with as many axes as x [B, …] or [B, T, …]."""
    return mask[(..., *[None] * (x.dim() - mask.dim()))]
