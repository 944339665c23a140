"""`mamba2`: Mamba-2 (Dao & Gu 2024, section 7) in the place of attention.

    x, B, C = conv(v), RoPE(conv(k)), RoPE(conv(q))        Δ = softplus(Wu + b)
    Sᵢ = exp(A Δᵢ) Sᵢ₋₁ + Δᵢ Bᵢxᵢᵀ        yᵢ = c · CᵢSᵢ + D xᵢ        v'ᵢ = s · SiLU(zᵢ) yᵢ

C, B and x are the teacher's query, key and value, as in MambaInLlama (Wang et al. 2024), and c is
its factor on QKᵀ. New parts start where they change nothing, as in Phi-Mamba (Bick et al. 2024):
the convolutions are deltas, the gate is 1, D is 0. With A = −1 and W = 0, the start is linear
attention with one decay per head, whose weights sum to about 1, since Δ is nearly 1 − exp(−Δ).
"""

import math
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from supra.kernels.causal_conv.api import MAX_TAPS
from supra.kernels.linear_attention import LinearAttentionState
from supra.mixers.base import Mixer
from supra.mixers.gates import HeadLogits, bounded_exp
from supra.mixers.inputs import AttentionShape, MixerInputs
from supra.mixers.read_out import SiLUGate, rms_norm
from supra.mixers.recurrence import LINEAR_ATTENTION, scan
from supra.mixers.short_conv import ShortConv, convolved_identity
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


@dataclass(frozen=True, config=STRICT)
class Mamba2Options:
    """conv_size: taps of the convolution over x, B and C; 1 for none.
    activation: after the convolution: "none", or "silu" as published. SiLU nearly removes negative
        features, and the teacher's have both signs.
    normalize: "none", or "rms", RMSNorm with one group per head after the gate, as published.
    scale: whether the output is multiplied by s, one factor per head and channel.
    output_gate: whether the output is multiplied by SiLU(z), z = Wu + b of the hidden states u.
    rotary: whether queries and keys are rotated to their positions, as in the teacher.
    """

    conv_size: int = Field(4, ge=1, le=MAX_TAPS)
    activation: Literal["none", "silu"] = "none"
    normalize: Literal["none", "rms"] = "none"
    scale: bool = True
    output_gate: bool = True
    rotary: bool = True


class Mamba2State(NamedTuple):
    memory: Tensor  # [B, Hq, K, V], float32; transposed from the paper's
    conv_state: Tensor  # [B, conv_size − 1, channels of x, B and C], the newest last


class Mamba2(Mixer):
    """A selective state space with one decay per head, computed as linear attention."""

    name = "mamba2"
    Options = Mamba2Options
    State = Mamba2State

    def __init__(self, shape: AttentionShape, options: Mamba2Options):
        super().__init__(
            shape,
            options,
            norm=rms_norm if options.normalize == "rms" else None,
            scale=options.scale,
            output_gate=SiLUGate(shape) if options.output_gate else None,
        )
        values = shape.key_heads * shape.value_size
        features = (shape.key_heads + shape.query_heads) * shape.head_size
        self.conv = ShortConv(values + features, options.conv_size)
        self.dt = HeadLogits(shape)
        self.A_log = nn.Parameter(torch.empty(shape.query_heads))
        self.D = nn.Parameter(torch.empty(shape.query_heads))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        heads = self.shape.query_heads
        self.A_log.data.zero_()
        self.D.data.zero_()
        self._set_half_life(4 * 512 ** (torch.arange(heads) / max(1, heads - 1)))

    def mix(
        self, inputs: MixerInputs, state: Mamba2State | None = None, return_state: bool = False
    ) -> tuple[Tensor, Mamba2State | None]:
        memory, conv_state = state or (None, None)
        inputs, conv_state = self._convolve(inputs, conv_state, return_state)
        output, memory = self._scan(inputs, memory, return_state)
        return output, None if memory is None else Mamba2State(memory, conv_state)

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
        groups = self.shape.query_heads // self.shape.key_heads
        key, value = (x.repeat_interleave(groups, dim=2) for x in (key, inputs.value))
        step = F.softplus(self.dt(inputs.hidden_states))
        output, end = scan(
            LINEAR_ATTENTION, inputs, query, key, (step[..., None] * value).to(value.dtype),
            log_decay=-bounded_exp(self.A_log) * step,
            state=None if memory is None else LinearAttentionState(memory, None),
            return_state=return_state,
            scale=inputs.scaling,
        )  # fmt: skip
        return output + self.D[:, None] * value, None if end is None else end.memory

    def matrix(self, inputs: MixerInputs) -> Tensor:
        """[B, Hq, T, T]. The taps over values differ by channel: here each head uses their mean.
        The SiLU on values is left out, since it is not linear."""
        convolved, _ = self._convolve(inputs)
        taps = self.conv.weight[: self.shape.key_heads * self.shape.value_size]
        output, _ = self._scan(replace(convolved, value=convolved_identity(inputs, taps)))
        return output.transpose(1, 2)

    def read_out(self, inputs: MixerInputs, output: Tensor) -> Tensor:
        """As published, the gate comes before the norm."""
        return self.scaled(self.normalized(self.gated(output, inputs)))

    @torch.no_grad()
    def calibrate(self, inputs: MixerInputs, target: Tensor) -> None:
        """Choose per head, one after the other: the decay, the bias of C, the skip; and the scale
        with each."""
        if not self.options.scale:
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

    def _set_half_life(self, tokens: Tensor) -> None:
        """Start every head [Hq] with this half-life. With A = −1, Δ sets both how much is forgotten
        and how much is written."""
        step = math.log(2) / tokens.double()
        self.dt.set(step + (-torch.expm1(-step)).log())  # the inverse of softplus
