"""State policies: bounds on what a state keeps, applied without training.

A model that never had to forget in training can lose its state beyond the trained length (Chen et
al. 2024, arXiv 2410.07145v1). Each field of a policy is one remedy:

    decay_scale, insert_scale    Sᵢ = c_a γᵢ Sᵢ₋₁ + c_b kᵢvᵢᵀ             forget more, insert less
    norm                         Sᵢ ← Sᵢ · min(1, p / ‖Sᵢ‖)              every norm_every tokens
    window                       Sᵢ − γ_{i−r+1} ⋯ γᵢ Sᵢ₋ᵣ                 only the last r tokens

A window is exact for one layer. In a stack, each layer reads outputs that layers below computed
from their own windows, so a token has an effect for at most r times the number of layers.
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

MAX_WINDOW = 2**17  # tokens; all of them are held in memory, and few contexts are longer


@dataclass(frozen=True)
class StatePolicy:
    """decay_scale: c_a, a factor on the decay of every token, > 0 and <= 1. With 1 − 1/n, a token
        is forgotten after about n tokens, whatever the gates say.
    insert_scale: c_b, a factor on what is written to the state, > 0 and <= 1. It changes only
        outputs that also have a part from elsewhere, such as a skip or a window's softmax, and
        outputs that are not normalised.
    norm: p, the largest Frobenius norm of a head's state. Either one number, or one list per layer
        with a number per head, such as [[1.5, 2.0], [1.1, 0.8]]; the list of a layer that keeps
        softmax attention is empty.
    norm_every: the norm is checked every so many tokens of a row. 1 is the published form: then a
        prompt is read token by token, which is slow.
    window: r, how many of the last tokens are in the state.
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
                f"window (={self.window}) with norm: a state that was scaled down is no longer a "
                "sum from which old tokens can be subtracted; give one of them"
            )

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "StatePolicy":
        """Read `state_policy` of a config. Raises UserError for an unknown field."""
        if not isinstance(fields, dict):
            raise UserError(f"state_policy (={fields!r}) must be a mapping, or null for none")
        known = [*cls.__dataclass_fields__]
        for name in fields:
            if name not in known:
                raise UserError(f"state_policy: {name!r} is none of {', '.join(known)}")
        return cls(**fields)

    def of_layer(self, layer: int) -> "LayerPolicy | None":
        """The policy of one layer; None if it changes nothing there."""
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
    """A StatePolicy for one layer: `norm` is one number, or one per head."""

    decay_scale: float = 1.0
    insert_scale: float = 1.0
    norm: Thresholds | None = None
    norm_every: int = 64
    window: int | None = None

    @property
    def keeps_past(self) -> bool:
        """Whether the state needs the fields of Past beside it."""
        return self.norm is not None or self.window is not None

    def check_heads(self, heads: int) -> None:
        """Raise UserError if the number of thresholds does not fit the layer's heads. A memory may
        have several heads for each head of the layer."""
        count = len(self.norm) if isinstance(self.norm, tuple) else 1
        if heads % count and count % heads:
            raise _other_heads(count, heads)

    def scaled_log_decay(self, log_decay: Tensor) -> Tensor:
        return log_decay if self.decay_scale == 1 else log_decay + math.log(self.decay_scale)

    def scaled(self, written: Tensor) -> Tensor:
        return written if self.insert_scale == 1 else written * self.insert_scale


class Past(NamedTuple):
    """What a policy keeps beside a mixer's own state. The batch comes first here too."""

    past_key: Tensor | None = None  # [B, r, H, K], the oldest token first
    past_value: Tensor | None = None  # [B, r, H, V]
    past_log_decay: Tensor | None = None  # [B, r, H] or [B, r, H, K]
    past_state: Tensor | None = None  # the state of r tokens ago (h3 only)
    past_count: Tensor | None = None  # int [B], tokens read so far


@functools.cache
def with_past(state: type) -> type:
    """A NamedTuple of the fields of a mixer's State, followed by those of Past."""
    fields = (*state.__annotations__.items(), *Past.__annotations__.items())
    return NamedTuple(f"{state.__name__}WithPast", fields)


class PolicyRun:
    """A policy in one call of a mixer. `past` is what was kept before the call, then after it."""

    def __init__(self, policy: LayerPolicy, past: Past | None):
        self.policy = policy
        self.past = past or Past()

    def delay(
        self,
        tensors: dict[str, Tensor],
        padding_mask: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> dict[str, Tensor]:
        """Each tensor [B, T, …] delayed by r tokens within its document, with zeros in front.

        Padding must be at the end of a row. The names are those of Past without "past_".
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

        Computed as a difference of sums. A quotient of products would be 0 / 0 after a reset.
        """
        size = self.policy.window
        if cu_seqlens is not None:
            sums = log_decay.double().cumsum(1)
            return sums - _in_documents(sums, size, cu_seqlens)
        sums = self._joined("log_decay", log_decay, padding_mask).double().cumsum(1)
        return sums[:, size:] - sums[:, :-size]

    def _joined(self, name: str, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        """The r tokens before the call, then x [B, T, …]. The last r tokens become the new past."""
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
    """x [1, N, …] delayed by `size` tokens within each document, with zeros in front."""
    bounds = cu_seqlens.to(x.device)
    at = torch.arange(x.shape[1], device=x.device)
    start = bounds[torch.bucketize(at, bounds, right=True) - 1]
    inside = (at - size >= start).view(1, -1, *[1] * (x.dim() - 2))
    return torch.where(inside, x[:, (at - size).clamp(min=0)], 0.0)


def clamp_factors(policy: LayerPolicy, memory: Tensor) -> Tensor:
    """Factors <= 1, [B, H], that bring the norm of each head's memory [B, H, …] to its threshold.

    If there are fewer thresholds than H, each one is for several heads of the memory together.
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
        f"norm has {count} thresholds for a layer of {heads} heads: give one per head, or one "
        "number for all"
    )
