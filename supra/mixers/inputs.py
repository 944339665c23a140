"""The inputs of a mixer: the sizes of its attention module, the rotation, the tensors of a call.

Notation: B batch, T tokens of this call, Hq query heads, Hkv key/value heads (Hkv divides Hq),
K head size of query and key, V head size of value, D hidden size. Layout [B, T, H, D].
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from supra.mixers.row_parts import RowPart
from supra.mixers.state_policy import PolicyRun

MIN_POWER = 1e-5  # smallest mean square of a head that anything is divided by
NORM_EPS = 1e-5  # of norms, where nothing says otherwise

# Takes the log decays of a call: [H], [B, T, H] or [B, T, H, K], or None if nothing decays.
Watch = Callable[[Tensor | None], None]


@dataclass(frozen=True)
class AttentionShape:
    """The sizes of the attention module that the mixer is a part of.

    norm_eps: the eps of the model's own RMSNorms, which other architectures give to a mixer's norm.
    """

    query_heads: int
    key_heads: int
    head_size: int
    value_size: int
    hidden_size: int
    norm_eps: float = NORM_EPS


@dataclass(frozen=True)
class Rotary:
    """The family's own rotation, at the positions of this call.

    `cos` and `sin` are [B or 1, T, R], or [B or 1, T, R / 2] if the two features of a pair share
    one angle. `size` is R, which may be smaller than the head size (partial rotary). `rotate` is
    the family's `apply_rotary_pos_emb`: some families rotate halves, some interleaved pairs.
    """

    cos: Tensor
    sin: Tensor
    rotate: Callable[..., tuple[Tensor, Tensor]]
    size: int

    def __call__(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate query [B, T, Hq, K] and key [B, T, Hkv, K]; features beyond R pass unchanged."""
        size = self.size
        rotated = self.rotate(
            query[..., :size], key[..., :size], self.cos, self.sin, unsqueeze_dim=2
        )
        if query.shape[-1] == size:
            return rotated
        return tuple(
            torch.cat([new, old[..., size:]], dim=-1)
            for new, old in zip(rotated, (query, key), strict=True)
        )


@dataclass(frozen=True)
class MixerInputs:
    """All that a mixer may read in one call. Query and key are not rotated yet."""

    hidden_states: Tensor  # [B, T, D], the input of the attention module
    query: Tensor  # [B, T, Hq, K], after biases and QK-norm; see Mixer.drops_qk_norm
    key: Tensor  # [B, T, Hkv, K]
    value: Tensor  # [B, T, Hkv, V]
    rotary: Rotary | None  # None for families without rotary positions
    scaling: float  # the teacher's factor on QKᵀ
    sliding_window: int | None  # the teacher's window in tokens, the current one included
    softcap: float | None  # the teacher's cap c on scores: c·tanh(QKᵀ·scaling / c)
    sinks: Tensor | None  # [Hq]: one more score in each head's softmax, for no token (gpt-oss)
    padding_mask: Tensor | None  # bool [B, T], False where padded; None: no padding
    cu_seqlens: Tensor | None  # int [N + 1]: bounds of documents in the row B·T; None: one per row
    policy_run: PolicyRun | None = None  # the state policy at work in this call
    watch: Watch | None = None
    part: RowPart | None = None  # the rows lie on several ranks, and these are the tokens of one

    def rotated(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Query and key at their positions; unchanged in families without rotary positions."""
        return (query, key) if self.rotary is None else self.rotary(query, key)

    def first(self, tokens: int) -> "MixerInputs":
        """The first tokens of every row. The inputs must not be packed."""
        names = ("hidden_states", "query", "key", "value", "padding_mask")
        cut = {name: x[:, :tokens] for name in names if (x := getattr(self, name)) is not None}
        if self.rotary is not None:
            cos, sin = (x[:, :tokens] for x in (self.rotary.cos, self.rotary.sin))
            cut["rotary"] = replace(self.rotary, cos=cos, sin=sin)
        return replace(self, **cut)

    def first_rows(self, count: int) -> "MixerInputs":
        """The first rows of the batch, packed or not."""
        names = ("hidden_states", "query", "key", "value", "padding_mask")
        cut = {name: x[:count] for name in names if (x := getattr(self, name)) is not None}
        if self.rotary is not None:  # one row of angles may serve all
            cos, sin = self.rotary.cos[:count], self.rotary.sin[:count]
            cut["rotary"] = replace(self.rotary, cos=cos, sin=sin)
        if self.cu_seqlens is not None:
            end = cut["query"].shape[:2].numel()
            cut["cu_seqlens"] = self.cu_seqlens[self.cu_seqlens <= end]
        return replace(self, **cut)

    def magnitudes(self) -> tuple[Tensor, Tensor]:
        """Root mean squares of each head's queries [Hq] and keys [Hkv], never 0."""
        squares = (x.float().square().mean((0, 1, 3)) for x in (self.query, self.key))
        return tuple(x.clamp(min=MIN_POWER).sqrt() for x in squares)

    def query_head_magnitudes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Root mean squares of query, key and value for each query head, [Hq] each, never 0."""
        squares = [x.float().square().mean((0, 1, 3)) for x in (self.query, self.key, self.value)]
        groups = len(squares[0]) // len(squares[1])
        squares[1:] = [x.repeat_interleave(groups) for x in squares[1:]]
        return tuple(x.clamp(min=MIN_POWER).sqrt() for x in squares)
