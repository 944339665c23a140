"""What a state may keep: cures without training for states that fall apart beyond the length that
a model was trained on, where it never had to forget (Chen et al. 2024, arXiv 2410.07145v1).

    decay_scale, insert_scale    Sᵢ = c_a γᵢ Sᵢ₋₁ + c_b kᵢvᵢᵀ             forget more, insert less
    norm                         Sᵢ ← Sᵢ · min(1, p / ‖Sᵢ‖)              every so many tokens
    window                       Sᵢ − γ_{i−r+1} ⋯ γᵢ Sᵢ₋ᵣ                 the last r tokens alone

A window is exact for one layer. Of several, each reads what those below made of their own windows,
so a token is felt for at most the number of layers times r.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from supra.errors import UserError, check_whole
from supra.mixers.padding import pick

Thresholds = float | tuple[float, ...]

MAX_WINDOW = 2**17  # tokens; they are held in memory, and few contexts are longer


@dataclass(frozen=True)
class StatePolicy:
    """decay_scale: c_a, from 0 (exclusive) to 1, on the decay of every token. 1 − 1/n forgets
        within some n tokens whatever the gates say.
    insert_scale: c_b, on what is written. It matters beside what does not come from the state: a
        skip, a window's own softmax; a normalised output does not change.
    norm: p, the largest Frobenius norm of a head's state; one number, or one a head in a list a
        layer, as [[1.5, 2.0], [1.1, 0.8]]; of layers that keep attention, an empty one.
    norm_every: tokens of a row from one look at the norm to the next. 1 is as published, where the
        recurrence is no longer a scan and a prompt is read token by token.
    window: r, the tokens that are in the state.
    """

    decay_scale: float = 1.0
    insert_scale: float = 1.0
    norm: float | tuple[tuple[float, ...], ...] | None = None
    norm_every: int = 64
    window: int | None = None

    def __post_init__(self):
        for name in ("decay_scale", "insert_scale"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 < value <= 1:
                raise UserError(f"{name} (={value!r}) must be > 0 and <= 1")
        check_whole("norm_every", self.norm_every, 1)
        if self.window is not None:
            check_whole("window", self.window, 1, MAX_WINDOW)
        if isinstance(self.norm, Sequence) and not isinstance(self.norm, str):
            layers = tuple(tuple(x) if isinstance(x, Sequence) else (x,) for x in self.norm)
            object.__setattr__(self, "norm", layers)
        found = [x for row in self.norm for x in row] if isinstance(self.norm, tuple) else []
        found += [] if isinstance(self.norm, tuple | None) else [self.norm]
        for value in found:
            if not _is_number(value) or not value > 0:
                raise UserError(f"norm (={value!r}) must be positive, or null for any size")
        if self.norm is not None and self.window is not None:
            raise UserError(
                f"window (={self.window}) with norm: a state that was cut down is no longer a sum "
                "from which a token's part could be taken; give one of them"
            )

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "StatePolicy":
        """The policy of `state_policy` in a config. Raises UserError for an unknown name."""
        if not isinstance(fields, dict):
            raise UserError(f"state_policy (={fields!r}) must be a mapping, or null for none")
        known = [*cls.__dataclass_fields__]
        for name in fields:
            if name not in known:
                raise UserError(f"state_policy: {name!r} is none of {', '.join(known)}")
        return cls(**fields)

    def of_layer(self, layer: int) -> "LayerPolicy | None":
        """What a layer's mixer needs of it; None where it changes nothing."""
        norm = self.norm
        if isinstance(norm, tuple):
            if layer >= len(norm):
                raise UserError(
                    f"norm has thresholds for {len(norm)} layers, and there is a layer {layer}: "
                    "give a list for every layer"
                )
            norm = norm[layer]
        found = LayerPolicy(
            self.decay_scale, self.insert_scale, norm or None, self.norm_every, self.window
        )
        return None if found == LayerPolicy(norm_every=self.norm_every) else found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class LayerPolicy:
    """A StatePolicy as one mixer has it: `norm` is a number or one a head."""

    decay_scale: float = 1.0
    insert_scale: float = 1.0
    norm: Thresholds | None = None
    norm_every: int = 64
    window: int | None = None

    @property
    def keeps_past(self) -> bool:
        """Whether more than the state has to be carried on."""
        return self.norm is not None or self.window is not None

    def check_heads(self, heads: int) -> None:
        """Raise UserError for thresholds of other heads than a layer's; a memory may have several
        for each."""
        count = len(self.norm) if isinstance(self.norm, tuple) else 1
        if heads % count and count % heads:
            raise _other_heads(count, heads)

    def scaled_log_decay(self, log_decay: Tensor) -> Tensor:
        return log_decay if self.decay_scale == 1 else log_decay + math.log(self.decay_scale)

    def scaled(self, written: Tensor) -> Tensor:
        return written if self.insert_scale == 1 else written * self.insert_scale


class Past(NamedTuple):
    """What a policy carries beside a mixer's own state; the batch first, as there."""

    past_key: Tensor | None = None  # [B, r, H, K], what leaves the window next in front
    past_value: Tensor | None = None  # [B, r, H, V]
    past_log_decay: Tensor | None = None  # [B, r, H] or [B, r, H, K]
    past_state: Tensor | None = None  # h3's of r tokens ago
    past_count: Tensor | None = None  # int [B], tokens so far


@functools.cache
def with_past(state: type) -> type:
    """The fields of a mixer's State, then those of Past."""
    fields = (*state.__annotations__.items(), *Past.__annotations__.items())
    return NamedTuple(f"{state.__name__}WithPast", fields)


class PolicyRun:
    """A policy during one call of a mixer: the past before it, and in its place the one after."""

    def __init__(self, policy: LayerPolicy, past: Past | None):
        self.policy = policy
        self.past = past or Past()

    def delay(
        self,
        tensors: dict[str, Tensor],
        padding_mask: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> dict[str, Tensor]:
        """Each tensor [B, T, …] as it was r tokens before in its document, zeros before the first.

        Padding lies at the end of a row. The names are Past's, less "past_".
        """
        size = self.policy.window
        if cu_seqlens is not None:
            return {name: _in_documents(x, size, cu_seqlens) for name, x in tensors.items()}
        return {
            name: self._joined(name, x, padding_mask)[:, : x.shape[1]]
            for name, x in tensors.items()
        }

    def window_log_decay(
        self, log_decay: Tensor, padding_mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        """log_decay [B, T, …] summed over the last r tokens, float64.

        A difference of sums: quotients of products would be 0 / 0 after a reset.
        """
        size = self.policy.window
        if cu_seqlens is not None:
            sums = log_decay.double().cumsum(1)
            return sums - _in_documents(sums, size, cu_seqlens)
        sums = self._joined("log_decay", log_decay, padding_mask).double().cumsum(1)
        return sums[:, size:] - sums[:, :-size]

    def _joined(self, name: str, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        """x [B, T, …] behind the r tokens before it; the last r go into the past."""
        name, size = f"past_{name}", self.policy.window
        before = getattr(self.past, name)
        if before is None:
            before = x.new_zeros(x.shape[0], size, *x.shape[2:])
        elif before.shape[1] != size:
            raise UserError(
                f"past_key_values were made with a window of {before.shape[1]} tokens, not {size}: "
                "begin with an empty cache after a change of state_policy"
            )
        joined = torch.cat([before, x], dim=1)
        after = joined[:, x.shape[1] :]
        if padding_mask is not None:
            places = torch.arange(size, device=x.device)
            after = pick(joined, padding_mask.sum(1)[:, None] + places)
        self.past = self.past._replace(**{name: after})
        return joined


def _in_documents(x: Tensor, size: int, cu_seqlens: Tensor) -> Tensor:
    """x [1, N, …] of `size` tokens before in the same document, zeros before its first."""
    bounds = cu_seqlens.to(x.device)
    at = torch.arange(x.shape[1], device=x.device)
    start = bounds[torch.bucketize(at, bounds, right=True) - 1]
    inside = (at - size >= start).view(1, -1, *[1] * (x.dim() - 2))
    return torch.where(inside, x[:, (at - size).clamp(min=0)], 0.0)


def clamp_factors(policy: LayerPolicy, memory: Tensor) -> Tensor:
    """What brings the norm of each head's memory [B, H, …] down to its threshold: [B, H], <= 1.

    Where thresholds are fewer than H, a head of attention has several of the memory's.
    """
    heads = len(policy.norm) if isinstance(policy.norm, tuple) else memory.shape[1]
    if memory.shape[1] % heads:
        raise _other_heads(heads, memory.shape[1])
    norms = memory.reshape(len(memory), heads, -1).norm(dim=-1)
    largest = torch.tensor(policy.norm, dtype=norms.dtype, device=norms.device)
    factors = (largest / norms.clamp(min=torch.finfo(norms.dtype).tiny)).clamp(max=1)
    return factors.repeat_interleave(memory.shape[1] // heads, dim=1)


def _other_heads(count: int, heads: int) -> UserError:
    return UserError(
        f"norm has {count} thresholds for a layer of {heads} heads: give one a head, or one number "
        "for all"
    )
