"""The layer that `gated_deltanet` and `kda` share: a delta rule over short convolutions of query,
key and value, with a norm and a gate after it.

    q, k, v = SiLU(conv(x + b · wu)) of the teacher's query, key and value x, as sign pairs [x, −x]
    q, k = x · (Σx² + 1e-6)^-½        β = σ(W_b u)
    Sᵢ = (1 − βᵢ kᵢkᵢᵀ) diag(γᵢ) Sᵢ₋₁ + βᵢ kᵢvᵢᵀ        v'ᵢ = s · RMSNorm(qᵢSᵢ) · gate(u)

u are the hidden states. What differs is the decay γ and the gate.

The published layers have no biases at their projections. Here wu is near 1 on all tokens, so
multiples of w act as biases: b · wu, and the start of W_b. The published layers can hold all of
this: pairs and b fold into their projections of u, and s into their output projections.
"""

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from supra.kernels.causal_conv.api import MAX_TAPS
from supra.kernels.checks import MAX_KEY_CHANNELS
from supra.mixers.base import Mixer
from supra.mixers.gates import HeadLogits, fill_heads
from supra.mixers.inputs import MIN_POWER, AttentionShape, MixerInputs
from supra.mixers.one_token import (
    Step,
    as_dtype,
    flat,
    joined,
    over_length,
    projection,
    rotated,
    shaped,
)
from supra.mixers.read_out import RmsNorm
from supra.mixers.recurrence import Operation, scan
from supra.mixers.ridge import constant_direction
from supra.mixers.short_conv import ShortConv, convolved_identity
from supra.mixers.signs import ONE_SIGN, SIGN_PAIR, signed
from supra.settings.model import STRICT

STRENGTH = 0.12  # β at the start
HALF_LIVES = tuple(4.0**n for n in range(7))  # tokens; candidates in calibration
STRENGTHS = (0.03, 0.06, 0.12, 0.25, 0.5)  # β; candidates in calibration
# Factors before SiLU, in units of 1 over the root mean square of a head. Of large numbers SiLU is a
# ReLU, of small ones it is nearly linear.
SHARPNESSES = (0.25, 0.5, 1.0, 2.0)
CHOICE_TOKENS = 1024  # about how many a choice reads: it is one of few, and takes most of the time
LENGTH_EPS = 1e-6  # of the published layers
PARTS = ("query", "key", "value")  # in the order of the convolution's channels


@dataclass(frozen=True, config=STRICT)
class DeltaLayerOptions:
    """The options of both layers."""

    conv_size: int = Field(4, ge=1, le=MAX_TAPS)
    sign_pairs: bool | None = None
    beta_range: float = Field(1.0, ge=1.0, le=2.0)
    rotary: bool = False
    init: Literal["teacher", "published"] = "teacher"


class DeltaLayer(Mixer):
    """A delta rule with keys and values of its own for every query head.

    A mixer of this kind names its operation, has the three methods of its decay, and gives its gate
    to `__init__`. The fields of its State are the memory and the state of the convolution.
    """

    operation: ClassVar[Operation]
    from_scratch: ClassVar = {"init": "published", "sign_pairs": False}
    drops_qk_norm = True  # queries and keys get a length of 1 here
    refuses: ClassVar = {
        "window": "what the delta rule writes depends on what was stored before, so no token can "
        "be subtracted again; take decay_scale or norm",
        "insert_scale": "the delta rule erases as much as it writes; take decay_scale or norm",
    }

    def __init__(
        self,
        shape: AttentionShape,
        options: DeltaLayerOptions,
        output_gate: Callable[[AttentionShape], nn.Module],
    ):
        """output_gate: makes the gate from the sizes that the heads have inside."""
        pairs = options.sign_pairs
        if pairs is None:
            pairs = 2 * max(shape.head_size, shape.value_size) <= MAX_KEY_CHANNELS
        signs = SIGN_PAIR if pairs else ONE_SIGN
        heads, blocks = shape.query_heads, len(signs)
        inner = replace(
            shape, head_size=blocks * shape.head_size, value_size=blocks * shape.value_size
        )
        super().__init__(
            shape,
            options,
            norm=RmsNorm(shape.norm_eps),
            scale=True,
            output_gate=output_gate(inner),
            signs=signs,
            rotary=options.rotary,
        )
        sizes = inner.head_size, inner.head_size, inner.value_size
        self.conv = ShortConv(heads * sum(sizes), options.conv_size, bias=False, gain=True)
        self.query_bias, self.key_bias, self.value_bias = (
            nn.Parameter(torch.empty(heads, size)) for size in sizes
        )
        self.constant = HeadLogits(replace(shape, query_heads=1), bias=False)
        self._add_decay(inner)  # before β: saved states of optimizers have this order
        self.strength = HeadLogits(shape, bias=False)

    @abstractmethod
    def _add_decay(self, shape: AttentionShape) -> None:
        """Register the parameters of the decay, for heads of these sizes."""

    @abstractmethod
    def _log_decay(self, hidden_states: Tensor) -> Tensor:
        """Logs of the decays, [B, T, Hq] or [B, T, Hq, P · K], from [B, T, D]."""

    @abstractmethod
    def _set_half_life(self, tokens: Tensor) -> None:
        """Start every head [Hq] with this half-life in tokens."""

    @abstractmethod
    def _reset_decay_as_published(self) -> None:
        """Start the decay as the published layer does."""

    def reset_parameters(self) -> None:
        """Without a text, any w is as good as another; `calibrate` fits it."""
        super().reset_parameters()
        shape, heads = self.shape, self.shape.query_heads
        fixed = torch.Generator().manual_seed(0)
        direction = torch.randn(shape.hidden_size, generator=fixed) / math.sqrt(shape.hidden_size)
        self._set_constant(direction)
        for bias in (self.query_bias, self.key_bias, self.value_bias):
            bias.data.zero_()
        self._set_half_life(4 * 512 ** (torch.arange(heads) / max(1, heads - 1)))
        if self.options.init == "published":
            self.conv.reset_as_published()
            self.output_gate.reset_as_published()
            self._reset_decay_as_published()
            self.strength.reset_as_published()

    def mix(
        self, inputs: MixerInputs, state: Any = None, return_state: bool = False
    ) -> tuple[Tensor, Any]:
        memory, conv_state = state or (None, None)
        inputs, conv_state = self._convolve(inputs, conv_state, return_state)
        output, memory = self._scan(inputs, memory, return_state)
        return output, None if memory is None else self.State(memory, conv_state)

    def prepared_step(self, dtype: torch.dtype) -> Step:
        """With query, key and value side by side, widened by one choice of channels."""
        heads, size = self.query_bias.shape
        features, values = 2 * heads * size, self.value_bias.numel()
        biases = torch.cat([x.flatten() for x in (self.query_bias, self.key_bias, self.value_bias)])
        places, signs = self._channels(biases)
        conv, read_out = self.conv.prepared(silu=True), self.prepared_read_out(dtype)
        weight, log_decay = self._prepared_decay()
        small = [self.constant.weight, self.strength.weight, weight]
        parts, small = [len(x) for x in small], projection(torch.cat(small), None, biases.dtype)
        signs, eps = signs.to(dtype), biases.new_full((1,), LENGTH_EPS)
        beta_range = self.options.beta_range

        def step(inputs: MixerInputs, state: Any) -> tuple[Tensor, Any]:
            hidden = flat(inputs.hidden_states)
            batch = hidden.shape[0]
            by_head = batch * heads, 1, -1
            constant, strength, decay = small(as_dtype(hidden, biases)).split_with_sizes(parts, 1)
            given = joined(inputs, PARTS).view(batch, -1).index_select(1, places)
            given = torch.addcmul(as_dtype(constant * biases, given), given, signs)
            given, conv_state = conv(given.view(batch, 1, -1), state.conv_state)
            given, value = given.split_with_sizes((features, values), 1)
            given = over_length(given.view(batch, 2 * heads, size), eps)
            if inputs.rotary is not None:
                given = rotated(given.view(batch, 2 * heads * len(self.signs), -1), inputs.rotary)
                given = given.view(batch, 2 * heads, size)
            query, key = given.split_with_sizes((heads, heads), 1)
            decay = as_dtype(log_decay(decay), state.memory).exp()
            memory = state.memory * decay.view(batch, heads, -1, 1)
            shared = memory.view(-1, size, memory.shape[3])
            query, key, value = (shaped(x, *by_head) for x in (query, key, value))
            error = torch.baddbmm(value, key, shared, alpha=-1)
            error.mul_(strength.sigmoid().view(-1, 1, 1))
            shared.addcmul_(key.view(-1, size, 1), error, value=beta_range)
            output = torch.baddbmm(value, query, shared, beta=0, alpha=size**-0.5)
            return read_out(output, hidden), self.State(memory, conv_state)

        return step

    @abstractmethod
    def _prepared_decay(self) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """A weight W [C, D] of hidden states u, and the function from Wu [B, C] to log decays,
        [B, Hq] or [B, Hq · P · K]."""

    def _channels(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Where each channel of the convolution is in query, key and value side by side, and its
        sign: [C] each."""
        heads, key_heads = self.shape.query_heads, self.shape.key_heads
        start, places, signs = 0, [], []
        sign = torch.tensor(self.signs, dtype=like.dtype)[None, :, None]
        sizes = (self.shape.head_size,) * 2 + (self.shape.value_size,)
        for own, size in zip((heads, key_heads, key_heads), sizes, strict=True):
            at = start + torch.arange(own * size).view(own, 1, size)
            at = at.repeat_interleave(heads // own, dim=0)
            places.append(at.expand(-1, len(self.signs), -1).flatten())
            signs.append(sign.expand(heads, -1, size).flatten())
            start += own * size
        return tuple(torch.cat(x).to(like.device) for x in (places, signs))

    def _convolve(
        self, inputs: MixerInputs, state: Tensor | None = None, return_state: bool = False
    ) -> tuple[MixerInputs, Tensor | None]:
        """The inputs with the features [B, T, Hq, P · K or P · V] of query, key and value in their
        place; and the state of the convolution."""
        constant = self.constant(inputs.hidden_states).flatten(0, 1)  # [B·T, 1]
        groups = self.shape.query_heads // self.shape.key_heads
        key, value = (x.repeat_interleave(groups, dim=2) for x in (inputs.key, inputs.value))
        heads = {
            name: self._shifted(signed(x, self.signs), constant, bias)
            for name, x, bias in (
                ("query", inputs.query, self.query_bias),
                ("key", key, self.key_bias),
                ("value", value, self.value_bias),
            )
        }
        inputs = replace(inputs, **heads)
        return self.conv(inputs, PARTS, activation="silu", state=state, return_state=return_state)

    @staticmethod
    def _shifted(x: Tensor, constant: Tensor, bias: Tensor) -> Tensor:
        """x [B, T, Hq, C] plus the bias [Hq, C] times each token's constant."""
        factors = constant.to(x.dtype), bias.flatten()[None].to(x.dtype)
        return torch.addmm(x.flatten(2).flatten(0, 1), *factors).view(x.shape)

    def _scan(
        self, inputs: MixerInputs, memory: Tensor | None = None, return_state: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The recurrence over features."""
        query, key = self._rotated(inputs, *(of_length_one(x) for x in (inputs.query, inputs.key)))
        strength = self.options.beta_range * self.strength(inputs.hidden_states).sigmoid()
        return scan(
            self.operation, inputs, query, key, inputs.value, strength,
            log_decay=self._log_decay(inputs.hidden_states),
            state=memory,
            return_state=return_state,
            scale=query.shape[-1] ** -0.5,
        )  # fmt: skip

    def _rotated(self, inputs: MixerInputs, *features: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys at their positions, the blocks of a pair one by one."""
        blocks = (self.in_blocks(x).flatten(2, 3) for x in features)
        return tuple(x.reshape(features[0].shape) for x in inputs.rotated(*blocks))

    @torch.no_grad()
    def calibrate(self, inputs: MixerInputs, target: Tensor) -> None:
        """Fit w. Choose per head, one after the other: the half-life, the strength, the sharpness
        of queries. Fit the taps of values per channel, and the gate per head."""
        inputs = self.placed(inputs)
        self._set_constant(constant_direction(inputs.hidden_states))
        sizes = inputs.query_head_magnitudes()
        gains = self._parts(self.conv.gain)
        for gain, size in zip(gains, sizes, strict=True):
            fill_heads(gain, 1 / size)
        rows = max(1, CHOICE_TOKENS // inputs.query.shape[1])
        some = inputs.first_rows(rows), target[:rows]
        self._choose_decay(*some)
        self.choose(*some, STRENGTHS, self._set_strength)
        self.choose(*some, SHARPNESSES, lambda x: fill_heads(gains[0], x / sizes[0]))
        self._fit_value_taps(inputs, target)
        self.choose(*some, STRENGTHS, self._set_strength)
        self.output_gate.follow(inputs.hidden_states, self(inputs)[0], target)
        self.choose(inputs, target, (0.0,), lambda _: None)

    def _choose_decay(self, inputs: MixerInputs, target: Tensor) -> None:
        """Choose the decay of every head."""
        self.choose(inputs, target, HALF_LIVES, self._set_half_life)

    def _fit_value_taps(self, inputs: MixerInputs, target: Tensor) -> None:
        """Give each channel of values the taps of the smallest error. What the norm divides by
        depends on them; here it stays as it is."""
        sums, _ = self.mix(inputs)
        factor = self.norm(sums).norm(dim=-1) / sums.norm(dim=-1).clamp(min=MIN_POWER)
        taps, outputs = self._parts(self.conv.weight.data)[2], []
        for tap in range(self.options.conv_size):
            taps.zero_()[..., tap] = 1
            sums, _ = self.mix(inputs)
            first, *negative = self.in_blocks(sums * factor[..., None]).unbind(-2)
            outputs.append(first - sum(negative))
        self.set_taps(taps, outputs, target)

    def matrix(self, inputs: MixerInputs) -> Tensor:
        """[B, Hq, T, T]. The taps over values differ by channel: here each head uses their mean.
        The SiLU on values is left out, since it is not linear."""
        heads = self.shape.query_heads
        taps = self.conv.taps()[0][-self.value_bias.numel() :]
        convolved, _ = self._convolve(inputs)
        inputs = replace(inputs, value=inputs.value[:, :, :1].expand(-1, -1, heads, -1))
        output, _ = self._scan(replace(convolved, value=convolved_identity(inputs, taps)))
        return output.transpose(1, 2)

    def _set_constant(self, direction: Tensor) -> None:
        """Start from this w [D], with every strength at its start where wu is 1."""
        self.constant.weight.data.copy_(direction)
        self._set_strength(torch.full((self.shape.query_heads,), STRENGTH))

    def _set_strength(self, share: Tensor) -> None:
        """Start every head [Hq] at this β where wu is 1."""
        self.strength.weight.data.copy_(share.logit()[:, None] * self.constant.weight)

    def _parts(self, channels: Tensor) -> list[Tensor]:
        """Views of what the convolution has per channel, of query, key and value: [Hq, channels, …]
        each."""
        sizes = [x.numel() for x in (self.query_bias, self.key_bias, self.value_bias)]
        return [x.unflatten(0, (self.shape.query_heads, -1)) for x in channels.split(sizes)]


def of_length_one(x: Tensor) -> Tensor:
    """x [..., C] divided by its length, in its own dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return (wide * torch.rsqrt(length.square() + LENGTH_EPS)).to(x.dtype)
