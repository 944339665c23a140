"""The oracle: the causal convolution token by token in float64, differentiable by autograd."""

import torch
import torch.nn.functional as F
from torch import Tensor


def recurrence(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    activation: str | None,
    bounds: list[int],
) -> tuple[Tensor, Tensor]:
    """Output [B, T, D] and final state [N, W - 1, D], both float64.

    bounds: first token of every sequence in the flattened [B * T] tokens, and the end.
    """
    (width, taps), sequences = weight.shape, len(bounds) - 1
    if state is None:
        state = input.new_zeros(sequences, taps - 1, width)
    tokens, columns = input.double().flatten(0, 1), weight.double().T
    bias = None if bias is None else bias.double()
    outputs, ends = [], []
    for n in range(sequences):
        past = state[n].double()
        for t in range(bounds[n], bounds[n + 1]):
            window = torch.cat((past, tokens[t : t + 1]))
            output = (window * columns).sum(0)
            outputs.append(output if bias is None else output + bias)
            past = window[1:]
        ends.append(past)
    output = torch.stack(outputs).view(input.shape)
    return F.silu(output) if activation == "silu" else output, torch.stack(ends)
