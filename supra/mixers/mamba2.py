"""`mamba2`: Mamba-2 (Dao & Gu 2024, section 7) in the place of attention.

    x, B, C = conv(v), RoPE(conv(k)), RoPE(conv(q))        Δ = softplus(Wu + b)
    Sᵢ = exp(A Δᵢ) Sᵢ₋₁ + Δᵢ Bᵢxᵢᵀ        yᵢ = c · CᵢSᵢ + D xᵢ        v'ᵢ = s · SiLU(zᵢ) yᵢ

C, B and x are the teacher's query, key and value, as in MambaInLlama (Wang et al. 2024), and c is
its factor on QKᵀ. New parts start where they change nothing, as in Phi-Mamba (Bick et al. 2024):
the convolutions are deltas, the gate is 1, D is 0. With A = −1 and W = 0, the start is linear
attention with one decay per head, whose weights sum to about 1, since Δ is nearly 1 − exp(−Δ).

The form "granite" is the layer of Granite 4 with other weights:

    x, B, C = SiLU(conv([v, −v])), SiLU(conv([k, −k])), SiLU(conv([q, −q]))
    yᵢ = CᵢSᵢ + D xᵢ        [aᵢ, bᵢ] = s · RMSNorm(SiLU(zᵢ) yᵢ)        v'ᵢ = aᵢ + bᵢ

Signs fold into the projections before and after it, and s is the weight of its norm.
"""

import math
from dataclasses import replace
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from supra.errors import UserError
from supra.kernels.causal_conv.api import MAX_TAPS
from supra.kernels.linear_attention import LinearAttentionState
from supra.mixers.base import Mixer
from supra.mixers.gates import HeadLogits, bounded_exp, fill_heads, inverse_softplus
from supra.mixers.inputs import NORM_EPS, AttentionShape, MixerInputs
from supra.mixers.one_token import Step, as_dtype, flat, joined, rotated, shaped
from supra.mixers.options import Form
from supra.mixers.read_out import RmsNorm, SiLUGate
from supra.mixers.recurrence import LINEAR_ATTENTION, scan
from supra.mixers.ridge import constant_direction
from supra.mixers.short_conv import ShortConv, convolved_identity
from supra.mixers.signs import ONE_SIGN, SIGN_PAIR, Signs, signed
from supra.settings.model import STRICT

HALF_LIVES = tuple(4.0**n for n in range(7))  # tokens; candidates in calibration
# Biases of B and C, in units of keys and queries. They bring each weight near a constant plus the
# score, as the teacher's exponentials are for small scores. The error on SmolLM2-135M falls by an
# eighth.
KEY_BIAS, QUERY_BIASES = 0.5, (0.0, 0.25, 0.5, 1.0, 2.0)
SKIPS = (
    -1.0,
    -0.3,
    0.0,
    0.1,
    0.3,
    1.0,
    3.0,
    10.0,
)  # D; below 0 too, since sums without normalization can be too large

# A layer of Granite 4: GraniteMoeHybridMambaLayer in transformers.
GRANITE = Form(
    fixed={
        "activation": "silu", "normalize": "rms", "scale": True, "output_gate": True,
        "rotary": False,
    },
    defaults={"sign_pairs": True},
)  # fmt: skip
# In Granite's form B and C start as SiLU(SHARPNESS · (x / |x| + bias)). With 1 in place of 0.2, the
# error on SmolLM2-135M rises from 0.34 to 0.38.
SHARPNESS = 0.2
# Sums start this far below the norm's √eps, up to a factor of B and C. So small, they pass the norm
# nearly unchanged, and SiLU of values is linear. What they lack is in the scale.
VALUE_SIZE = 0.3
# Δ of Granite's form at the start. llama.cpp computes softplus without log1p, which costs three
# digits of a Δ of 1e-4: slow heads have a small A instead.
MIN_STEP = 1 / 64
# Tokens on which Granite's form judges candidates. Its heads take three times mamba2's time.
JUDGED_TOKENS = 1024
LARGEST_A = 16  # −A at the start, as published; 1 is the smallest
KEY_SHIFTS = (-0.3, 0.0, 0.2, 0.4, 0.7, 1.0)  # shares of the token before, in calibration


@dataclass(frozen=True, config=STRICT)
class Mamba2Options:
    """form: "supra"; or "granite", a layer of Granite 4, which other engines run: with SiLU, the
        norm and the gate, without rotary positions and without a bias in the gate. Its output is 0
        until it is calibrated.
    conv_size: taps of the convolution over x, B and C; 1 for none.
    activation: after the convolution: "none", or "silu" as published. SiLU nearly removes negative
        features, and the teacher's have both signs.
    normalize: "none", or "rms", RMSNorm with one group per head after the gate, as published.
    scale: whether the output is multiplied by s, one factor per head and channel.
    output_gate: whether the output is multiplied by SiLU(z), z = Wu + b of the hidden states u.
    rotary: whether queries and keys are rotated to their positions, as in the teacher.
    init: "teacher": the start described above; or "published", random, for models that are trained
        from the start: steps Δ from 1e-3 to 0.1, A from −16 to −1, D = 1, convolutions and gate as
        those of `nn.Conv1d` and `nn.Linear`.
    sign_pairs: in the form "granite", whether heads are twice as wide: v, k and q become [v, −v],
        [k, −k] and [q, −q], and the output is the difference of its halves. What SiLU removes from
        one half is in the other. True in this form unless set otherwise.
    """

    forms: ClassVar = {"granite": GRANITE}

    form: Literal["supra", "granite"] = "supra"
    conv_size: int = Field(4, ge=1, le=MAX_TAPS)
    activation: Literal["none", "silu"] = "none"
    normalize: Literal["none", "rms"] = "none"
    scale: bool = True
    output_gate: bool = True
    rotary: bool = True
    init: Literal["teacher", "published"] = "teacher"
    sign_pairs: bool = False

    def __post_init__(self):
        if self.sign_pairs and self.form != "granite":
            raise UserError(
                f"sign_pairs (=True) of mamba2 belong to form=granite, got form={self.form}: set "
                "form to granite, or leave sign_pairs out"
            )


class Mamba2State(NamedTuple):
    memory: Tensor  # [B, Hq, K, V], float32; transposed from the paper's
    conv_state: Tensor  # [B, conv_size − 1, channels of x, B and C], the newest last


def granite_shape(shape: AttentionShape, signs: Signs) -> AttentionShape:
    """The sizes of the heads inside Granite's form: a key and a value for every query head."""
    sizes = {name: len(signs) * getattr(shape, name) for name in ("head_size", "value_size")}
    return replace(shape, key_heads=shape.query_heads, **sizes)


class Mamba2(Mixer):
    """A selective state space with one decay per head, computed as linear attention."""

    name = "mamba2"
    gate_first = True  # as published
    Options = Mamba2Options
    State = Mamba2State
    from_scratch: ClassVar = {
        "init": "published", "activation": "silu", "normalize": "rms", "rotary": False,
    }  # fmt: skip

    def __init__(self, shape: AttentionShape, options: Mamba2Options):
        granite, signs = options.form == "granite", SIGN_PAIR if options.sign_pairs else ONE_SIGN
        inner = granite_shape(shape, signs) if granite else shape
        eps = shape.norm_eps if granite else NORM_EPS
        super().__init__(
            shape,
            options,
            norm=RmsNorm(eps) if options.normalize == "rms" else None,
            scale=options.scale,
            output_gate=SiLUGate(inner, bias=not granite) if options.output_gate else None,
            signs=signs,
            rotary=options.rotary,
        )
        self.inner = inner
        values = inner.key_heads * inner.value_size
        features = (inner.key_heads + inner.query_heads) * inner.head_size
        self.conv = ShortConv(values + features, options.conv_size, gain=granite)
        self.dt = HeadLogits(shape)
        self.A_log = nn.Parameter(torch.empty(shape.query_heads))
        self.D = nn.Parameter(torch.empty(shape.query_heads))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.options.init == "published":
            self._reset_as_published()
            return
        heads = self.shape.query_heads
        self.A_log.data.zero_()
        self.D.data.zero_()
        self._set_half_life(4 * 512 ** (torch.arange(heads) / max(1, heads - 1)))

    def _reset_as_published(self) -> None:
        for module in (self.conv, self.dt, self.output_gate):
            if module is not None:
                module.reset_as_published()
        self.A_log.data.uniform_(1, LARGEST_A).log_()
        self.D.data.fill_(1)

    def mix(
        self, inputs: MixerInputs, state: Mamba2State | None = None, return_state: bool = False
    ) -> tuple[Tensor, Mamba2State | None]:
        memory, conv_state = state or (None, None)
        inputs = self._widened(inputs)
        inputs, conv_state = self._convolve(inputs, conv_state, return_state)
        output, memory = self._scan(inputs, memory, return_state)
        return output, None if memory is None else Mamba2State(memory, conv_state)

    def prepared_step(self, dtype: torch.dtype) -> Step | None:
        """With x, B and C side by side, as their convolution has them."""
        if self.options.form == "granite":
            return None
        shape, read_out = self.shape, self.prepared_read_out(dtype)
        groups = shape.query_heads // shape.key_heads
        values = shape.key_heads * shape.value_size
        sizes = values, (shape.key_heads + shape.query_heads) * shape.head_size
        heads = shape.key_heads, shape.query_heads
        conv = self.conv.prepared(self.options.activation == "silu")
        dt, slope = self.dt.prepared(), -bounded_exp(self.A_log)
        skip = self.D.view(shape.key_heads, groups, 1, 1)

        def step(inputs: MixerInputs, state: Mamba2State) -> tuple[Tensor, Mamba2State]:
            batch, hidden = inputs.query.shape[0], flat(inputs.hidden_states)
            mixed, conv_state = conv(joined(inputs, ("value", "key", "query")), state.conv_state)
            value, features = mixed.split_with_sizes(sizes, 1)
            features = rotated(features.view(batch, sum(heads), -1), inputs.rotary)
            key, query = features.split_with_sizes(heads, 1)
            delta = F.softplus(dt(as_dtype(hidden, slope)))
            value = value.view(batch, heads[0], 1, 1, -1)
            decay = as_dtype(slope * delta, state.memory).exp()
            memory = state.memory * decay.view(batch, -1, 1, 1)
            memory.view(batch, heads[0], groups, *memory.shape[2:]).addcmul_(
                key.view(batch, heads[0], 1, -1, 1), delta.view(batch, -1, groups, 1, 1) * value
            )
            output = torch.baddbmm(
                (skip * value).view(-1, 1, shape.value_size), shaped(query, -1, 1, shape.head_size),
                memory.view(-1, *memory.shape[2:]), alpha=inputs.scaling,
            )  # fmt: skip
            return read_out(output, hidden), Mamba2State(memory, conv_state)

        return step

    def _widened(self, inputs: MixerInputs) -> MixerInputs:
        """The inputs with the heads that the recurrence has. Granite's form has a key and a value
        for every query head."""
        if self.options.form != "granite":
            return inputs
        groups = self.shape.query_heads // self.shape.key_heads
        key, value = (x.repeat_interleave(groups, dim=2) for x in (inputs.key, inputs.value))
        heads = {"query": inputs.query, "key": key, "value": value}
        return replace(inputs, **{name: signed(x, self.signs) for name, x in heads.items()})

    def _convolve(
        self, inputs: MixerInputs, state: Tensor | None = None, return_state: bool = False
    ) -> tuple[MixerInputs, Tensor | None]:
        """The inputs with x, B and C as value, key and query; and the state of the convolution."""
        activation = "silu" if self.options.activation == "silu" else None
        names = ("value", "key", "query")
        return self.conv(
            inputs, names, activation=activation, state=state, return_state=return_state
        )

    def _scan(
        self, inputs: MixerInputs, memory: Tensor | None = None, return_state: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The recurrence over x, B and C, and the skip."""
        query, key = inputs.rotated(inputs.query, inputs.key)
        groups = self.inner.query_heads // self.inner.key_heads
        key, value = (x.repeat_interleave(groups, dim=2) for x in (key, inputs.value))
        step = F.softplus(self.dt(inputs.hidden_states))
        output, end = scan(
            LINEAR_ATTENTION, inputs, query, key, (step[..., None] * value).to(value.dtype),
            log_decay=-bounded_exp(self.A_log) * step,
            state=None if memory is None else LinearAttentionState(memory, None),
            return_state=return_state,
            scale=1.0 if self.options.form == "granite" else inputs.scaling,
        )  # fmt: skip
        return output + self.D[:, None] * value, None if end is None else end.memory

    def matrix(self, inputs: MixerInputs) -> Tensor:
        """[B, Hq, T, T]. The taps over values differ by channel: here each head uses their mean.
        The SiLU on values is left out, since it is not linear."""
        inputs = self._widened(inputs)
        taps = self.conv.taps()[0][: self.inner.key_heads * self.inner.value_size]
        convolved, _ = self._convolve(inputs)
        output, _ = self._scan(replace(convolved, value=convolved_identity(inputs, taps)))
        return output.transpose(1, 2)

    @torch.no_grad()
    def calibrate(self, inputs: MixerInputs, target: Tensor) -> None:
        """Choose per head, one after the other: the decay, the bias of C, the skip; and the scale
        with each."""
        if not self.options.scale:
            return
        if self.options.form == "granite":
            self._calibrate_granite(inputs, target)
            return
        shape, size = self.shape, self.shape.head_size
        values, keys = shape.key_heads * shape.value_size, shape.key_heads * size
        bias = self.conv.bias.data[values:]
        key_bias, query_bias = bias[:keys], bias[keys:]
        query, key = inputs.magnitudes()
        self.choose(inputs, target, HALF_LIVES, self._set_half_life)
        key_bias.copy_((KEY_BIAS * key).repeat_interleave(size))
        self.choose(
            inputs, target, QUERY_BIASES,
            lambda bias: query_bias.copy_((bias * query).repeat_interleave(size)),
        )  # fmt: skip
        self.choose(inputs, target, HALF_LIVES, self._set_half_life)
        self.choose(inputs, target, SKIPS, self.D.data.copy_)

    def _calibrate_granite(self, inputs: MixerInputs, target: Tensor) -> None:
        """Open the gate. Choose per head: the decay, the bias of C, how much B is of the token
        before. Fit the taps of x per channel, which helps most."""
        self.output_gate.open(constant_direction(inputs.hidden_states))
        query, key, value = inputs.query_head_magnitudes()
        (_, key_bias, query_bias), (value_gain, key_gain, query_gain) = (
            self._parts(x) for x in (self.conv.bias.data, self.conv.gain)
        )
        key_taps = self._parts(self.conv.weight.data)[1]

        def set_half_life(tokens: Tensor) -> None:
            self._set_half_life(tokens)
            size = VALUE_SIZE * math.sqrt(self.shape.norm_eps) * self.A_log.exp()
            fill_heads(value_gain, size / value)

        def shift_keys(share: Tensor) -> None:
            key_taps[..., -2:] = torch.stack([share, 1 - share], -1)[:, None]

        fill_heads(key_gain, SHARPNESS / key)
        fill_heads(query_gain, SHARPNESS / query)
        rows = max(1, JUDGED_TOKENS // inputs.query.shape[1])
        few = inputs.first_rows(rows), target[:rows]
        self.choose(*few, HALF_LIVES, set_half_life)
        fill_heads(key_bias, KEY_BIAS * key)
        self.choose(*few, QUERY_BIASES, lambda x: fill_heads(query_bias, x * query))
        self._fit_value_taps(*few)
        if self.options.conv_size > 1:
            self.choose(*few, KEY_SHIFTS, shift_keys)
        self.choose(*few, HALF_LIVES, set_half_life)
        self._fit_value_taps(inputs, target)

    def _fit_value_taps(self, inputs: MixerInputs, target: Tensor) -> None:
        """Give each channel of x the taps, and the scale, of the smallest error."""
        taps, outputs = self._parts(self.conv.weight.data)[0], []
        self.set_scale(signed(torch.ones_like(target[0, 0]), self.signs))
        for tap in range(self.options.conv_size):
            taps.zero_()[..., tap] = 1
            outputs.append(self(inputs)[0])
        self.set_taps(taps, outputs, target)

    def _parts(self, channels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of what the convolution has per channel, of x, B and C: [Hq, channels, …] each."""
        inner = self.inner
        sizes = [inner.query_heads * x for x in (inner.value_size, *[inner.head_size] * 2)]
        return tuple(x.unflatten(0, (inner.query_heads, -1)) for x in channels.split(sizes))

    def _set_half_life(self, tokens: Tensor) -> None:
        """Start every head [Hq] with this half-life. Δ sets both how much is forgotten and how much
        is written: with A = −1, weights of tokens sum to about 1."""
        step = math.log(2) / tokens.double()
        if self.options.form == "granite":
            step = step.clamp(min=MIN_STEP)
            self.A_log.data.copy_((math.log(2) / tokens / step).log())
        self.dt.set(inverse_softplus(step))
