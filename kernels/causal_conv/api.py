"""Contract, validation and dispatch of the short causal depthwise convolution.

For every channel c, with W taps:

    y_t[c] = act(bias[c] + sum_{w < W} weight[c, W - 1 - w] x_{t - w}[c])

It is what H3 (Fu et al. 2023, the shift), Mamba-2 (Dao & Gu 2024) and Gated DeltaNet (Yang et al.
2025) put in front of their recurrence.

The state is the last W - 1 inputs, [N, W - 1, D], oldest first, in the dtype of the input: it holds
copies and no sums, so nothing is lost, and the sums of a run in two parts are those of one run to
the last bit. So are the outputs, but for torch's silu on a CPU, which rounds the last few values of
a tensor in its own way. Channels are innermost, as in the input, so that a decoding step reads and
writes whole rows.
"""

from typing import Any

import torch
from torch import Tensor

from supra.kernels import checks
from supra.kernels.backends import choose
from supra.kernels.causal_conv import reference
from supra.kernels.causal_conv import torch as torch_backend
from supra.kernels.causal_conv.inputs import Inputs
from supra.kernels.operators import Operator

OPERATION = "causal_conv"
OPERATOR = Operator(OPERATION, Inputs, torch_backend, reference)
ACTIVATIONS = (None, "silu")
MAX_TAPS = 64  # beyond it a Fourier transform is the better algorithm


def causal_conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Convolve whole sequences; for training and prefill.

    Other arguments, dtypes, gradients and errors (ValueError): see `supra.kernels.checks`.

    Args:
        input: [B, T, D].
        weight: [D, W] with 1 <= W <= 64, as torch.nn.Conv1d's depthwise weight [D, 1, W] squeezed:
            the last column multiplies the current token, the first the oldest.
        bias: [D] or None.
        activation: None or "silu".
        initial_state: the W - 1 inputs before the first token, [N, W - 1, D], in input.dtype. Where
            a sequence is shorter, its final state begins with the end of the initial one.

    Returns:
        Output [B, T, D] and the final state [N, W - 1, D] or None, both in input.dtype.
    """
    inputs = _checked(input, weight, bias, activation, initial_state, cu_seqlens, backend)
    output, end = _run(inputs)
    return output, end if return_state else None


def causal_conv_step(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    state: Tensor,
    activation: str | None = None,
    in_place: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Convolve the next token of every sequence; for decoding.

    Args:
        input: [B, D] or [B, 1, D].
        state: [B, W - 1, D], from `causal_conv(return_state=True)` or zeros.
        in_place: write the new state over `state` (contiguous, in input.dtype) and return that.
            It keeps no gradients, and raises where one is asked for.

    weight, bias, activation, backend and errors are those of `causal_conv`.

    Returns:
        Output, shaped as the input, and the new state, as `causal_conv` gives them for that token.
    """
    token = input[:, None] if input.dim() == 2 else input
    if token.dim() == 3 and token.shape[1] != 1:
        raise ValueError(f"input (shape {checks.shape(input)}) must be [B, D] or [B, 1, D]")
    if state is None:
        raise ValueError("state (=None) must be [B, W - 1, D]; give zeros before the first token")
    inputs = _checked(token, weight, bias, activation, state, None, backend, state_name="state")
    if in_place:
        output, end = OPERATOR.run_by_token(inputs, "state", state, True, in_place)
    else:
        output, end = _run(inputs)
    return output.view_as(input), end


def _run(inputs: Inputs) -> tuple[Tensor, Tensor]:
    packed, reference_asked = inputs.cu_seqlens is not None, inputs.backend == "reference"
    if torch.compiler.is_exporting() and not packed and not reference_asked:
        return torch_backend.plain(inputs)
    return OPERATOR.run(inputs, return_state=True)


def _checked(*arguments: Any, state_name: str = "initial_state") -> Inputs:
    """The arguments, with the state in the dtype of the input and the backend chosen."""
    input, weight, bias, activation, state, cu_seqlens, backend = arguments
    if input.dim() != 3:
        raise ValueError(f"input (shape {checks.shape(input)}) must be [B, T, D]")
    checks.check_not_empty("input", input)
    width = input.shape[2]
    if weight.dim() != 2 or weight.shape[0] != width:
        raise ValueError(
            f"weight (shape {checks.shape(weight)}) must be [{width}, W] to fit input; "
            "from a Conv1d take weight[:, 0]"
        )
    if not 1 <= weight.shape[1] <= MAX_TAPS:
        raise ValueError(f"weight (shape {checks.shape(weight)}) must have 1 to {MAX_TAPS} taps")
    checks.check_shape("bias", bias, (width,), "to fit input")
    if activation not in ACTIVATIONS:
        raise ValueError(checks.unknown("activation", activation, ("None", "silu")))
    checks.check_tensors(input=input, weight=weight, bias=bias)
    count = checks.check_packing("input", input, cu_seqlens)
    shape = (count, weight.shape[1] - 1, width)
    state = checks.check_state(state_name, state, shape, "[N, W - 1, D]", input.dtype, input=input)
    backend = choose(OPERATION, backend, *checks.present(input, weight, bias))
    return Inputs(input, weight, bias, state, cu_seqlens, activation == "silu", backend)
