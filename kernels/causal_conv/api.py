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

import torch
from torch import Tensor

from supra.kernels import checks
from supra.kernels.backends import choose, without_autocast
from supra.kernels.causal_conv import operator, reference
from supra.kernels.causal_conv import torch as torch_backend

OPERATION = "causal_conv"
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

    Args:
        input: [B, T, D], any floating dtype, as all inputs. B, T >= 1.
        weight: [D, W] with 1 <= W <= 64, as torch.nn.Conv1d's depthwise weight [D, 1, W] squeezed:
            the last column multiplies the current token, the first the oldest.
        bias: [D] or None.
        activation: None or "silu".
        initial_state: the W - 1 inputs before the first token, [N, W - 1, D]; None for zeros.
            Taken in input.dtype.
        return_state: also return the last W - 1 inputs. Where a sequence is shorter, the end of the
            initial state stays in front of it.
        cu_seqlens: [N + 1] integers 0 <= ... <= T, the bounds of N sequences packed in one row
            (B = 1); empty sequences are allowed. Each has its own state, and no tap reaches across
            a bound. The torch backend reads it on the host; the triton backend does not, and
            trusts its values.
        backend: "auto", "torch", "triton" or "reference" (float64, token by token). "auto" takes
            "triton" on a GPU for 16-bit and float32 inputs, and "torch" for all else. A backend
            that cannot run raises; none falls back to another.

    Returns:
        Output [B, T, D] and the final state [N, W - 1, D] or None, both in input.dtype. Everything
        is computed in float32 (float64 for float64 inputs), also under autocast. Gradients flow to
        and from all tensors, the states included; second derivatives need backend="reference".

    Raises:
        ValueError: shapes, sizes or names that do not fit, or a backend that cannot run.
    """
    _check(input, weight, bias, activation)
    sequences = checks.check_packing("input", input, cu_seqlens)
    state = _check_state("initial_state", initial_state, input, weight, sequences)
    backend = choose(OPERATION, backend, *_present(input, weight, bias))
    if backend == "reference":
        bounds = checks.bounds(cu_seqlens, *input.shape[:2])
        with without_autocast(input.device):
            output, end = reference.recurrence(input, weight, bias, state, activation, bounds)
        output, end = output.to(input.dtype), end.to(input.dtype)
    elif torch.compiler.is_exporting() and cu_seqlens is None:
        output, end = torch_backend.plain(input, weight, bias, state, silu=activation == "silu")
    else:
        silu = activation == "silu"
        output, end = operator.forward(input, weight, bias, state, cu_seqlens, silu, backend)
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
    _check(token, weight, bias, activation)
    if token.shape[1] != 1:
        raise ValueError(f"input (shape {checks.shape(input)}) must be [B, D] or [B, 1, D]")
    if state is None:
        raise ValueError("state (=None) must be [B, W - 1, D]; give zeros before the first token")
    _check_state("state", state, token, weight, token.shape[0])
    if in_place:
        checks.check_in_place(input.dtype, (input, weight, bias), state=state)
    backend = choose(OPERATION, backend, *_present(token, weight, bias))
    if not in_place or backend == "reference":
        output, end = causal_conv(
            token, weight, bias,
            activation=activation, initial_state=state, return_state=True, backend=backend,
        )  # fmt: skip
        state = state.copy_(end) if in_place else end
    elif backend == "torch":
        with without_autocast(input.device):
            output = torch_backend.step(token[:, 0], weight, bias, state, activation == "silu")
    else:
        output = operator.step(token[:, 0], weight, bias, state, activation == "silu")
    return output.view_as(input), state


def _present(*tensors: Tensor | None) -> list[Tensor]:
    return [x for x in tensors if x is not None]


def _check(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> None:
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
    if bias is not None and bias.shape != (width,):
        raise ValueError(f"bias (shape {checks.shape(bias)}) must be [{width}] to fit input")
    if activation not in ACTIVATIONS:
        raise ValueError(checks.unknown("activation", activation, ("None", "silu")))
    checks.check_tensors(input=input, weight=weight, bias=bias)


def _check_state(
    name: str, state: Tensor | None, input: Tensor, weight: Tensor, sequences: int
) -> Tensor | None:
    if state is None:
        return None
    shape = (sequences, weight.shape[1] - 1, input.shape[2])
    if state.shape != shape:
        raise ValueError(
            f"{name} (shape {checks.shape(state)}) must be {list(shape)} [N, W - 1, D]"
        )
    checks.check_tensors(input=input, **{name: state})
    return state.to(input.dtype)
