"""`kda`: Kimi Delta Attention (Kimi Linear, arXiv 2510.26692, section 4) in the place of attention.

It is the layer of supra/mixers/delta_layer.py with

    γ = exp(−exp(A) softplus(F_up F_down u + a))        gate(u) = 2σ(G_up G_down u + c)

A is a number per head. The decay γ differs by channel of the keys, so one head can remember at
several speeds. Both products pass through as many numbers as a head has channels of values, as in
the layers of Kimi Linear and of flash-linear-attention. Their weights can hold this layer.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from supra.kernels.backends import without_autocast
from supra.mixers.delta_layer import DeltaLayer, DeltaLayerOptions
from supra.mixers.gates import (
    bounded_exp,
    inverse_softplus,
    linear_start,
    published_log_steps,
    slope_of_half_life,
)
from supra.mixers.inputs import AttentionShape, MixerInputs
from supra.mixers.one_token import Projection, as_dtype
from supra.mixers.read_out import GATE_RIDGE, missing_factor
from supra.mixers.recurrence import KDA
from supra.mixers.ridge import ridge_regression
from supra.settings.model import STRICT

# Of the half-lives of a head's channels; candidates in calibration. Among layers 2, 9, 16 and 23 of
# SmolLM2-135M, the error falls from 0.298 to 0.286, and from 0.372 to 0.363 on other text.
FACTORS = (1.0, 1.2, 1.6, 2.7, 7.4)
LARGEST_A = 16  # exp(A) at the start, as published; 1 is the smallest


@dataclass(frozen=True, config=STRICT)
class KdaOptions(DeltaLayerOptions):
    """conv_size: taps of the convolution over query, key and value; 1 for none.
    sign_pairs: whether each head has [x, −x] in the place of x, since SiLU nearly removes negative
        numbers; null: if such a head has at most 256 channels.
    beta_range: the largest β, at most 2. Over 1 the state can change the sign of what it holds.
    rotary: whether queries and keys are rotated to their positions, as in the teacher.
    init: "teacher": a start near an average of values; or "published", random, for models that are
        trained from the start: steps of the decay from 1e-3 to 0.1, exp(A) up to 16, convolutions
        and gates as those of `nn.Conv1d` and `nn.Linear`.
    """


class KdaState(NamedTuple):
    memory: Tensor  # [B, Hq, P · K, P · V], float32
    conv_state: Tensor  # [B, conv_size − 1, channels of query, key and value], the newest last


class LowRank(nn.Module):
    """W_up W_down x + b per head and channel, W_up = 0 and b = 0 at the start. W_down is random, so
    that W_up learns."""

    def __init__(self, shape: AttentionShape, channels: int):
        super().__init__()
        rank, self.sizes = shape.value_size, (shape.query_heads, channels)
        self.down = nn.Parameter(torch.empty(rank, shape.hidden_size))
        self.up = nn.Parameter(torch.empty(math.prod(self.sizes), rank))
        self.bias = nn.Parameter(torch.empty(self.sizes))

    def reset_parameters(self) -> None:
        fixed = torch.Generator().manual_seed(0)
        random = torch.randn(self.down.shape, generator=fixed)
        self.down.data.copy_(random / math.sqrt(self.down.shape[1]))
        self.up.data.zero_()
        self.bias.data.zero_()

    def reset_as_published(self) -> None:
        """Random weights, and no bias."""
        for weight in (self.down, self.up):
            linear_start(weight)
        self.bias.data.zero_()

    def set_weight(self, weight: Tensor) -> None:
        """Start all channels of every head with W_up W_down = weight [Hq, D], or with what is
        nearest to it at this rank."""
        left, size, right = torch.linalg.svd(weight, full_matrices=False)
        size = size[: len(self.down)].sqrt()
        self.down.data[: len(size)] = size[:, None] * right[: len(size)]
        up = (left[:, : len(size)] * size).repeat_interleave(self.sizes[1], dim=0)
        self.up.data.zero_()[:, : len(size)] = up

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] to [B, T, Hq, channels]."""
        x = F.linear(F.linear(x.to(self.down.dtype), self.down), self.up)
        return x.unflatten(-1, self.sizes) + self.bias


class LowRankGate(LowRank):
    """2σ(W_up W_down x + b) per head and channel, 1 at the start: from hidden states [B, T, D]."""

    def __init__(self, shape: AttentionShape):
        super().__init__(shape, shape.value_size)

    def follow(self, hidden_states: Tensor, output: Tensor, target: Tensor) -> None:
        """Change a gate of 1 so that the outputs [B, T, Hq, V] come nearer to the target: by one
        factor per token and head, as far as its logarithm is linear in the hidden states."""
        missing = missing_factor(output, target) - 1
        change = ridge_regression(hidden_states, missing, GATE_RIDGE).mT
        self.set_weight(2 * change)  # 2σ has a slope of 1/2

    def prepared(self, dtype: torch.dtype) -> Projection:
        """The same in a step: from hidden states [B, D] of this dtype to [B, Hq · channels]."""
        down, up, bias = self.down.t(), self.up.t(), self.bias.flatten()

        def gate(x: Tensor) -> Tensor:
            half = torch.mm(torch.mm(as_dtype(x, bias), down), up).add_(bias).sigmoid_()
            return half.add_(half)

        return gate

    def forward(self, hidden_states: Tensor) -> Tensor:
        return 2 * super().forward(hidden_states).sigmoid()


class ChannelDecay(nn.Module):
    """log γ = −exp(A) softplus(F_up F_down x + a) per head and channel of keys. In float32 also
    under autocast."""

    def __init__(self, shape: AttentionShape):
        super().__init__()
        self.dt = LowRank(shape, shape.head_size)
        self.A_log = nn.Parameter(torch.empty(shape.query_heads))

    def reset_parameters(self) -> None:
        self.dt.reset_parameters()
        self.A_log.data.zero_()

    def reset_as_published(self) -> None:
        self.dt.reset_as_published()
        steps = published_log_steps(self.dt.bias.shape).exp()
        self.dt.bias.data.copy_(inverse_softplus(steps))
        self.A_log.data.uniform_(1, LARGEST_A).log_()

    def set_half_lives(self, tokens: Tensor) -> None:
        """Start every channel [Hq, K] with this half-life in tokens. The fastest channel of a head
        has a softplus of 1, and all channels learn at rates that are alike."""
        slope = slope_of_half_life(tokens.double())
        fastest = slope.amax(1)
        self.A_log.data.copy_(fastest)
        self.dt.bias.data.copy_(torch.expm1((slope - fastest[:, None]).exp()).log())

    def half_lives(self) -> Tensor:
        """What `set_half_lives` has set, [Hq, K]."""
        return math.log(2) / (self.A_log.exp()[:, None] * F.softplus(self.dt.bias))

    def prepared(self) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """What `DeltaLayer._prepared_decay` returns."""
        up, bias = self.dt.up.t(), self.dt.bias.flatten()
        slope = -bounded_exp(self.A_log).repeat_interleave(self.dt.sizes[1])
        return self.dt.down, lambda x: slope * F.softplus(torch.mm(x, up).add_(bias))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] to [B, T, Hq, K]."""
        with without_autocast(x.device):
            return -bounded_exp(self.A_log)[:, None] * F.softplus(self.dt(x))


class Kda(DeltaLayer):
    """The delta rule with a decay per channel, and keys and values of its own for every query
    head."""

    name = "kda"
    Options = KdaOptions
    State = KdaState
    operation = KDA

    def __init__(self, shape: AttentionShape, options: KdaOptions):
        super().__init__(shape, options, LowRankGate)

    def _add_decay(self, shape: AttentionShape) -> None:
        self.decay = ChannelDecay(shape)

    def _log_decay(self, hidden_states: Tensor) -> Tensor:
        return self.decay(hidden_states)

    def _prepared_decay(self) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        return self.decay.prepared()

    def _set_half_life(self, tokens: Tensor) -> None:
        self.decay.set_half_lives(tokens[:, None].expand_as(self.decay.dt.bias))

    def _reset_decay_as_published(self) -> None:
        self.decay.reset_as_published()

    def _choose_decay(self, inputs: MixerInputs, target: Tensor) -> None:
        """Choose the half-life of every head. Then choose by which factor it is longer in some of
        its channels and shorter in the others."""
        super()._choose_decay(inputs, target)
        start, longer = self.decay.half_lives(), self._longer(inputs, target)
        self.choose(
            inputs, target, FACTORS,
            lambda x: self.decay.set_half_lives(start * x[:, None] ** longer),
        )  # fmt: skip

    def _longer(self, inputs: MixerInputs, target: Tensor) -> Tensor:
        """For each channel [Hq, K], 1 if a longer half-life lowers the error, −1 if a shorter
        one does."""
        bias = self.decay.dt.bias.detach().clone().requires_grad_()
        with torch.enable_grad():
            output, _ = torch.func.functional_call(self, {"decay.dt.bias": bias}, (inputs,))
            error = (output.float() - target.float()).square().sum()
            (slope,) = torch.autograd.grad(error, bias)
        return slope.sign()  # where a smaller bias, a slower decay, lowers the error
