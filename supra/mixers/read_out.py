"""The pieces that turn a token's sums into a mixer's output: norms and gates."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from supra.mixers.gates import linear_start
from supra.mixers.inputs import MIN_POWER, NORM_EPS, AttentionShape
from supra.mixers.one_token import Projection, as_dtype, over_length, projection
from supra.mixers.ridge import ridge_regression

Norm = Callable[[Tensor], Tensor]  # of [B, T, Hq, V], over V alone: a token needs no other token


def group_norm(x: Tensor) -> Tensor:
    """GroupNorm with one group per head and no weights: mean 0 and variance 1 over V."""
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)


@dataclass(frozen=True)
class RmsNorm:
    """RMSNorm with one group per head and no weights: mean square 1 over V."""

    eps: float = NORM_EPS

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=self.eps)

    def prepared(self, like: Tensor) -> Norm:
        """The same in a step, for tensors of the dtype and device of `like`."""
        eps = like.new_full((1,), self.eps)
        return lambda x: over_length(x, eps, 1 / x.shape[-1])


class OutputGate(nn.Module):
    """2σ(Wx + b) per head and channel, 1 at the start: from hidden states [B, T, D].

    bias: whether there is a b.
    """

    def __init__(self, shape: AttentionShape, bias: bool = True):
        super().__init__()
        self.sizes = shape.query_heads, shape.value_size
        self.weight = nn.Parameter(torch.empty(math.prod(self.sizes), shape.hidden_size))
        self.bias = nn.Parameter(torch.empty(math.prod(self.sizes))) if bias else None

    def reset_parameters(self) -> None:
        self.weight.data.zero_()
        if self.bias is not None:
            self.bias.data.zero_()

    def reset_as_published(self) -> None:
        """Random weights, and no bias."""
        linear_start(self.weight)
        if self.bias is not None:
            self.bias.data.zero_()

    def forward(self, hidden_states: Tensor) -> Tensor:
        dtype = hidden_states.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        gate = F.linear(hidden_states, self.weight.to(dtype), bias)
        wide = torch.promote_types(dtype, torch.float32)
        return self.activate(gate.to(wide)).unflatten(-1, self.sizes)

    def prepared(self, dtype: torch.dtype) -> Projection:
        """The same in a step: from hidden states [B, D] of this dtype to [B, Hq · V]."""
        project = projection(self.weight, self.bias, dtype)
        like = torch.empty(0, dtype=torch.promote_types(dtype, torch.float32))
        return lambda x: self.activate(as_dtype(project(x), like))

    def activate(self, logits: Tensor) -> Tensor:
        half = logits.sigmoid()
        return half + half  # the product with a number of Python takes five operators


def missing_factor(output: Tensor, target: Tensor) -> Tensor:
    """The factor per token and head, [B, T, Hq], by which outputs [B, T, Hq, V] come nearest to the
    target."""
    power = output.float().square().sum(-1).clamp(min=MIN_POWER)
    return (output * target).float().sum(-1) / power


SILU_ONE = 1.2784645  # SiLU of it is 1
GATE_RIDGE = 1.0  # of 0.05 to 1 the best for SmolLM2-135M on text that was not fitted


class SiLUGate(OutputGate):
    """SiLU(Wx + b) per head and channel, 1 at the start: from hidden states [B, T, D]. Without a
    bias it is 0 until `open` is called."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.bias is not None:
            self.bias.data.fill_(SILU_ONE)

    @property
    def closed(self) -> bool:
        """Whether it is 0 for all hidden states."""
        return self.bias is None and not self.weight.any()

    def open(self, direction: Tensor) -> None:
        """Start at 1 without a bias: from a direction w [D] with w·x ≈ 1 for all tokens."""
        self.weight.data.copy_(SILU_ONE * direction)

    def follow(self, hidden_states: Tensor, output: Tensor, target: Tensor) -> None:
        """Change an open gate so that the outputs [B, T, Hq, V] come nearer to the target: by one
        factor per token and head, as far as it is a linear function of the hidden states."""
        missing = missing_factor(output, target) - 1
        change = ridge_regression(hidden_states, missing, GATE_RIDGE).mT  # SiLU has a slope of 1
        self.weight.data += change.repeat_interleave(self.sizes[1], dim=0)

    def activate(self, logits: Tensor) -> Tensor:
        return F.silu(logits)
