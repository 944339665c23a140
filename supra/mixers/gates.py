"""Numbers per token and head, computed from the hidden states: decays, strengths, weights."""

import math

import torch
from torch import Tensor, nn

from supra.kernels.backends import without_autocast
from supra.mixers.inputs import AttentionShape
from supra.mixers.one_token import Projection, projection

MAX_EXPONENT = 20.0


def bounded_exp(x: Tensor) -> Tensor:
    """exp(min(x, 20)): products and squares of it stay finite.

    Beyond 20 the gradient is the one at 20. A clamp would have none there, so that a parameter
    that ran away would never come back.
    """
    if not torch.is_grad_enabled():
        return x.clamp(max=MAX_EXPONENT).exp()
    at_bound = MAX_EXPONENT + (x - x.detach())
    return torch.where(x > MAX_EXPONENT, at_bound, x).exp()


def linear_start(weight: Tensor) -> None:
    """Random values as those of `nn.Linear`: uniform within 1/√fan_in."""
    bound = weight.shape[-1] ** -0.5
    weight.data.uniform_(-bound, bound)


class HeadLogits(nn.Module):
    """Wx + b, W = 0 at the start. In float32 even under autocast: bf16 rounds decays near 1."""

    def __init__(self, shape: AttentionShape, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape.query_heads, shape.hidden_size))
        self.bias = nn.Parameter(torch.empty(shape.query_heads)) if bias else None

    def reset_parameters(self) -> None:
        self.weight.data.zero_()
        if self.bias is not None:
            self.bias.data.zero_()

    def reset_as_published(self) -> None:
        """Random weights. The biases give steps Δ = softplus(b) from 1e-3 to 0.1, drawn evenly by
        their logarithms, as in Mamba and Mamba-2 (Gu & Dao 2023, section 3.6)."""
        linear_start(self.weight)
        if self.bias is not None:
            self.set(inverse_softplus(published_log_steps(self.bias.shape).exp()))

    def set(self, bias: Tensor) -> None:
        """Start every head [Hq] at this value for all tokens."""
        self.bias.data.copy_(bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, T, D] to [B, T, Hq]."""
        with without_autocast(hidden_states.device):
            hidden_states = hidden_states.to(self.weight.dtype)
            return nn.functional.linear(hidden_states, self.weight, self.bias)

    def prepared(self) -> Projection:
        """The same in a step: from hidden states [B, D], float32 or wider, to [B, Hq]."""
        return projection(self.weight, self.bias, self.weight.dtype)


PUBLISHED_STEPS = 1e-3, 1e-1  # smallest and largest Δ at the start


def published_log_steps(shape: torch.Size) -> Tensor:
    """Logarithms of random steps Δ, of this shape."""
    return torch.empty(shape).uniform_(*map(math.log, PUBLISHED_STEPS))


def inverse_softplus(step: Tensor) -> Tensor:
    """x with softplus(x) = step, exact for small steps."""
    return step + (-torch.expm1(-step)).log()


MIN_DECAY = 0.1  # per token


class DecayGate(HeadLogits):
    """log_decay of γ = a + (1 − a) σ(Wx + b). It starts with half-lives from 4 to 2048 tokens.

    Without the smallest decay a = 0.1, gates learn log decays of −10 and below for several tokens
    in a row. Those forget no more than a few of −2.3 do, but a chunk of `linear_attention` on a CPU
    may not span more than e^80: chunks become so short that a layer's gradient takes ten times as
    long.
    """

    def reset_parameters(self) -> None:
        super().reset_parameters()
        heads = len(self.bias)
        self.set_half_life(4 * 512 ** (torch.arange(heads) / max(1, heads - 1)))

    def set_half_life(self, tokens: Tensor) -> None:
        """Start every head [Hq] with this half-life in tokens, at least 0.31."""
        decay = torch.exp2(-1 / tokens.double())  # in float32, 1 - 1e-8 is 1
        self.set(((decay - MIN_DECAY) / (1 - MIN_DECAY)).logit())

    def forward(self, hidden_states: Tensor) -> Tensor:
        forgotten = (1 - MIN_DECAY) * (-super().forward(hidden_states)).sigmoid()
        return torch.log1p(-forgotten)  # exact near a decay of 1


def slope_of_half_life(tokens: Tensor) -> Tensor:
    """log(−log γ) for the decay γ with this half-life in tokens."""
    return (math.log(2) / tokens).log()


def fill_heads(tensor: Tensor, number: Tensor) -> None:
    """Write one number per head [H] into all channels of a tensor [H, D]."""
    tensor.data.copy_(number[:, None].expand_as(tensor))
