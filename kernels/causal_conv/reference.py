"""The oracle: the causal convolution token by token in float64, differentiable by autograd."""

import torch
import torch.nn.functional as F
from torch import Tensor

from supra.kernels import checks, oracle
from supra.kernels.causal_conv.inputs import Inputs


def recurrence(x: Inputs) -> tuple[Tensor, Tensor]:
    """Output [B, T, D] and final state [N, W - 1, D], both float64."""
    (tokens,), columns = oracle.flat(x.input), x.weight.double().T
    bias = 0 if x.bias is None else x.bias.double()

    def step(t: int, past: Tensor) -> tuple[Tensor, Tensor]:
        window = torch.cat((past, tokens[t : t + 1]))
        output = (window * columns).sum(0) + bias
        return F.silu(output) if x.silu else output, window[1:]

    return oracle.run(step, x.input, x.cu_seqlens, checks.given_or_zeros(x.state, x))
