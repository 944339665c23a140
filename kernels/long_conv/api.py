"""Contract, validation and dispatch of causal convolutions with a long kernel.

Every head h has a diagonal state-space model of M complex modes a_m = exp(log_decay + i frequency)
with weights c_m. With the state X_m in C^{K x V}:

    X_{m,t} = a_m X_{m,t-1} + k_t v_t^T

    o_t = q_t (2 Re sum_m c_m X_{m,t} + skip k_t v_t^T)

which is the convolution with the kernel kappa(l) = 2 Re sum_m c_m a_m^l:

    o_t = sum_{j <= t} kappa(t - j) (q_t . k_j) v_j + skip (q_t . k_t) v_t

A mode stands for itself and its conjugate. Heads of width 1 are H3's gated convolution q * (kappa *
(k v)), wider ones H3's with wide heads (Fu et al. 2023, section 3; the diagonal model is S4D's, Gu
et al. 2022). Without gates, o = kappa * v is the plain convolution of the channels of v, those of a
head with the same kernel.

`fft_conv` convolves with a kernel that is given tap by tap.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from supra.kernels import checks
from supra.kernels.backends import choose, without_autocast
from supra.kernels.long_conv import fft, modes, reference
from supra.kernels.long_conv import torch as torch_backend
from supra.kernels.long_conv.inputs import FftInputs, Inputs
from supra.kernels.operators import Operator

OPERATION = "long_conv"
OPERATOR = Operator("ssm_conv", Inputs, torch_backend, reference, package=__package__)
FFT_OPERATOR = Operator("fft_conv", FftInputs, fft)
CHUNK, FEW_TOKENS = 64, 4096  # few tokens do not repay larger matrices

Segment = tuple[Tensor | None, Tensor | None, Tensor]


def chunk_ssm_conv(
    query: Tensor | None,
    key: Tensor | None,
    value: Tensor,
    log_decay: Tensor,
    frequency: Tensor,
    weight: Tensor,
    skip: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Convolve whole sequences with the kernel of a state-space model, in chunks.

    Other arguments, dtypes, gradients and errors (ValueError): see `supra.kernels.checks`.

    Args:
        query: [B, T, H, K]. None for ones, K = 1.
        key: [B, T, H, K]. None for ones, K = 1.
        value: [B, T, H, V].
        log_decay: [H, M], log |a| <= 0 (not checked). A mode below -104 forgets at once. With
            bilinear discretisation of H3 (step dt, mode lambda), a = (1 + dt lambda / 2) / (1 - dt
            lambda / 2).
        frequency: [H, M], arg a in radians a token.
        weight: [H, M, 2], real and imaginary part of c, the input's weight multiplied in.
        skip: [H], the weight of the token itself beside the kernel; None for 0.
        initial_state: [N, H, M, 2, K, V], real and imaginary part of the state.
        chunk_size: None for 64, or 32 where B * T is at most 4096.

    Returns:
        Output [B, T, H, V] in value.dtype, and the final state or None.
    """
    model = (log_decay, frequency, weight, skip)
    inputs = _checked(query, key, value, *model, initial_state, cu_seqlens, chunk_size, backend)
    return OPERATOR.run(inputs, return_state)


def recurrent_ssm_conv(
    query: Tensor | None,
    key: Tensor | None,
    value: Tensor,
    log_decay: Tensor,
    frequency: Tensor,
    weight: Tensor,
    skip: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    in_place: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """`chunk_ssm_conv` token by token; for in_place see `supra.kernels.checks`."""
    model = (log_decay, frequency, weight, skip)
    inputs = _checked(query, key, value, *model, initial_state, None, CHUNK, backend)
    return OPERATOR.run_by_token(inputs, "initial_state", initial_state, return_state, in_place)


def stream_ssm_conv(
    segments: Iterable[Segment],
    log_decay: Tensor,
    frequency: Tensor,
    weight: Tensor,
    skip: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> Iterator[tuple[Tensor, Tensor]]:
    """Convolve a sequence that comes in segments. One segment at a time is in memory.

    The outputs together are those of one run over all of them, whatever the lengths, and so are the
    gradients: the state carries both. Without gradients the memory does not grow with the length.

    Args:
        segments: query, key and value of each, as `chunk_ssm_conv` takes them.

    The other arguments and the errors are those of `chunk_ssm_conv`.

    Yields:
        Output [B, T, H, V] of the segment, and the state after it.
    """
    state = initial_state
    for query, key, value in segments:
        output, state = chunk_ssm_conv(
            query, key, value, log_decay, frequency, weight, skip,
            initial_state=state, return_state=True, chunk_size=chunk_size, backend=backend,
        )  # fmt: skip
        yield output, state


def ssm_kernel(
    log_decay: Tensor,
    frequency: Tensor,
    weight: Tensor,
    skip: Tensor | None = None,
    *,
    length: int,
) -> Tensor:
    """The first `length` taps of the model's kernel, [H, length], skip added to the first.

    Arguments and precision are those of `chunk_ssm_conv`; `fft_conv` takes the result.
    """
    checks.check_positive(length=length)
    _check_model(log_decay, frequency, weight, skip)
    given = (log_decay, frequency, weight, skip)
    dtype = checks.state_dtype(*checks.present(*given))
    model = modes.Model(*(x if x is None else x.to(dtype) for x in given))
    with without_autocast(log_decay.device):
        return modes.kernel(model, length)


def fft_conv(
    input: Tensor,
    kernel: Tensor,
    *,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    block_size: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Causal convolution with any kernel, by fast Fourier transforms in blocks (overlap-add).

        output_t = sum_{l < L, l <= t} kernel_l input_{t - l}

    Args:
        input: [B, T, H, D], any floating dtype. B, T >= 1.
        kernel: [H, L], the current token's weight first; the D channels of a head share it.
        initial_state: [N, L - 1, H, D], what earlier input adds to the next L - 1 outputs; None for
            zeros.
        return_state: also return what this input, and the initial state, add to later outputs.
        cu_seqlens: as in `chunk_ssm_conv`; read on the host.
        block_size: tokens a block, >= 1; None for as many as the kernel has taps, at least 1024. A
            transform is as long as a block and the kernel, so that a sequence of any length takes
            the same room beside its input and output.

    Returns:
        Output [B, T, H, D] in input.dtype, and the final state or None, float32 (float64 for
        float64 inputs), as is every computation. Gradients flow to and from all tensors, but no
        second derivatives. It is made of torch's operations on every device.

    Raises:
        ValueError: shapes or sizes that do not fit.
    """
    checks.check_positive(block_size=block_size)
    if input.dim() != 4:
        raise ValueError(f"input (shape {checks.shape(input)}) must be [B, T, H, D]")
    checks.check_not_empty("input", input)
    if kernel.dim() != 2 or kernel.shape[0] != input.shape[2] or kernel.shape[1] < 1:
        raise ValueError(
            f"kernel (shape {checks.shape(kernel)}) must be [{input.shape[2]}, L] to fit input"
        )
    checks.check_tensors(input=input, kernel=kernel)
    dtype = checks.state_dtype(input, kernel)
    count = checks.check_packing("input", input, cu_seqlens)
    wanted = (count, kernel.shape[1] - 1, *input.shape[2:])
    state = checks.check_state(
        "initial_state", initial_state, wanted, "[N, L - 1, H, D]", dtype, input=input
    )
    inputs = FftInputs(input, kernel.to(dtype), state, cu_seqlens, block_size)
    return FFT_OPERATOR.run(inputs, return_state)


def _checked(*arguments: Any) -> Inputs:
    """The arguments, with model and state in the precision of the computation.

    The backend is chosen, and the size of a chunk.
    """
    query, key, value, *model, state, cu_seqlens, chunk_size, backend = arguments
    checks.check_positive(chunk_size=chunk_size)
    if value.dim() != 4:
        raise ValueError(f"value (shape {checks.shape(value)}) must be [B, T, H, V]")
    checks.check_not_empty("value", value)
    width = next((x.shape[-1] for x in (query, key) if x is not None), 1)
    if None in (query, key) and width != 1:
        name = "key" if key is None else "query"
        raise ValueError(f"{name} (=None) is ones of width 1 and the other has {width}; give both")
    checks.check_shape("query", query, (*value.shape[:3], width), "to fit value")
    checks.check_shape("key", key, (*value.shape[:3], width), "to fit value")
    _check_model(*model)
    if len(model[0]) != value.shape[2]:
        raise ValueError(
            f"log_decay (shape {checks.shape(model[0])}) must be [{value.shape[2]}, M] to fit value"
        )
    named = dict(zip(("log_decay", "frequency", "weight", "skip"), model, strict=True))
    checks.check_tensors(value=value, query=query, key=key, **named)
    present = checks.present(value, query, key, *model)
    dtype, count = checks.state_dtype(*present), checks.check_packing("value", value, cu_seqlens)
    wanted = (count, *model[0].shape, 2, width, value.shape[3])
    state = checks.check_state(
        "initial_state", state, wanted, "[N, H, M, 2, K, V]", dtype, value=value
    )
    backend = choose(OPERATION, backend, *present)
    model = (x if x is None else x.to(dtype) for x in model)
    size = chunk_size or (CHUNK if value.shape[:2].numel() > FEW_TOKENS else CHUNK // 2)
    return Inputs(query, key, value, *model, state, cu_seqlens, size, backend)


def _check_model(log_decay: Tensor, frequency: Tensor, weight: Tensor, skip: Tensor | None) -> None:
    if log_decay.dim() != 2 or log_decay.shape[1] < 1:
        raise ValueError(f"log_decay (shape {checks.shape(log_decay)}) must be [H, M] with M >= 1")
    heads, count = log_decay.shape
    for name, x, wanted in (
        ("frequency", frequency, (heads, count)),
        ("weight", weight, (heads, count, 2)),
        ("skip", skip, (heads,)),
    ):
        checks.check_shape(name, x, wanted, "to fit log_decay")
