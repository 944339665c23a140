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

import torch
from torch import Tensor

from supra.kernels import checks
from supra.kernels.backends import choose, without_autocast
from supra.kernels.long_conv import modes, operator, reference
from supra.kernels.long_conv import torch as torch_backend

OPERATION = "long_conv"
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

    Args:
        query: [B, T, H, K], any floating dtype, as all inputs. None for ones, K = 1.
            B, T >= 1.
        key: [B, T, H, K]. None for ones, K = 1.
        value: [B, T, H, V].
        log_decay: [H, M], log |a| <= 0 (not checked: that would synchronise a GPU). A mode below
            -104 forgets at once. With bilinear discretisation of H3 (step dt, mode lambda),
            a = (1 + dt lambda / 2) / (1 - dt lambda / 2).
        frequency: [H, M], arg a in radians a token.
        weight: [H, M, 2], real and imaginary part of c, the input's weight multiplied in.
        skip: [H], the weight of the token itself beside the kernel; None for 0.
        initial_state: [N, H, M, 2, K, V], real and imaginary part of the state before the first
            token; None for zeros. N is the batch size, or the number of packed sequences.
        return_state: also return the state after the last token.
        cu_seqlens: [N + 1] integers 0 <= ... <= T, the bounds of N sequences packed in one row
            (B = 1); empty sequences are allowed. Each has its own state; none crosses a bound. The
            torch backend reads it on the host: keep it on the CPU to spare a GPU the
            synchronisation.
        chunk_size: tokens a chunk of the torch backend, >= 1; None for 64, or 32 where B * T is at
            most 4096. Changes speed and rounding only.
        backend: "auto", "torch", "triton" or "reference" (float64, token by token). "auto" is
            triton on a GPU where triton can run, torch elsewhere. A backend that cannot run raises;
            none falls back to another.

    Returns:
        Output [B, T, H, V] in value.dtype, and the final state or None. The state is float32, or
        float64 for float64 inputs; so is every computation, also under autocast. Gradients flow to
        and from all tensors, the states included; second derivatives need backend="reference".

    Raises:
        ValueError: shapes, sizes or names that do not fit, or a backend that cannot run.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size (={chunk_size}) must be >= 1")
    gates, model, dtype = _check(query, key, value, log_decay, frequency, weight, skip)
    sequences = checks.check_packing("value", value, cu_seqlens)
    state = _check_state(initial_state, key, value, log_decay, sequences, dtype)
    backend = choose(OPERATION, backend, *_present(value, *gates, *model))
    if backend == "reference":
        output, end = _reference(*gates, value, *model, state, cu_seqlens)
    else:
        size = chunk_size or (CHUNK if value.shape[:2].numel() > FEW_TOKENS else CHUNK // 2)
        output, end = operator.forward(*gates, value, *model, state, cu_seqlens, size, backend)
    return output, end if return_state else None


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
    """The same function token by token; for decoding, where T = 1 is one short step.

    Arguments, results and errors are those of `chunk_ssm_conv`, and one more:

    in_place: write the final state into the tensor initial_state and return that, so that a step
        allocates no state. It must be contiguous, float32 (float64 for float64 inputs), and need no
        gradient. Otherwise the state that is passed in is not changed.

    With backend="triton", a call that needs gradients runs the chunked kernels.
    """
    gates, model, dtype = _check(query, key, value, log_decay, frequency, weight, skip)
    state = _check_state(initial_state, key, value, log_decay, value.shape[0], dtype)
    inputs = (*gates, value, *model)
    if in_place:
        checks.check_in_place(dtype, inputs, initial_state=initial_state)
    backend = choose(OPERATION, backend, *_present(value, *gates, *model))
    if backend == "reference":
        output, end = _reference(*inputs, state, None)
        end = initial_state.copy_(end) if in_place else end
    elif backend == "torch":
        with without_autocast(value.device):
            output, end = torch_backend.recurrent(*inputs, state, in_place=in_place)
    elif checks.needs_gradient(*inputs, state):
        output, end = operator.forward(*inputs, state, None, CHUNK, backend)
    else:
        rows = value.shape[0]
        end = state if in_place else torch_backend.start(state, key, value, model[0], rows)
        output = operator.step(*inputs, end)
    return output, end if return_state else None


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
    """Convolve a sequence that comes in segments, of which one at a time is in memory.

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
    if length < 1:
        raise ValueError(f"length (={length}) must be >= 1")
    _check_model(log_decay, frequency, weight, skip)
    dtype = checks.state_dtype(*_present(log_decay, frequency, weight, skip))
    model = modes.Model(
        *(x if x is None else x.to(dtype) for x in (log_decay, frequency, weight, skip))
    )
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
    if block_size is not None and block_size < 1:
        raise ValueError(f"block_size (={block_size}) must be >= 1")
    if input.dim() != 4:
        raise ValueError(f"input (shape {checks.shape(input)}) must be [B, T, H, D]")
    checks.check_not_empty("input", input)
    if kernel.dim() != 2 or kernel.shape[0] != input.shape[2] or kernel.shape[1] < 1:
        raise ValueError(
            f"kernel (shape {checks.shape(kernel)}) must be [{input.shape[2]}, L] to fit input"
        )
    checks.check_tensors(input=input, kernel=kernel, initial_state=initial_state)
    sequences = checks.check_packing("input", input, cu_seqlens)
    wanted = (sequences, kernel.shape[1] - 1, *input.shape[2:])
    if initial_state is not None and initial_state.shape != wanted:
        raise ValueError(
            f"initial_state (shape {checks.shape(initial_state)}) must be {list(wanted)} "
            "[N, L - 1, H, D]"
        )
    dtype = checks.state_dtype(input, kernel)
    state = None if initial_state is None else initial_state.to(dtype)
    output, end = operator.fft_forward(input, kernel.to(dtype), state, cu_seqlens, block_size)
    return output, end if return_state else None


def _reference(*inputs_and_bounds):
    *inputs, cu_seqlens = inputs_and_bounds
    value, log_decay = inputs[2:4]
    with without_autocast(value.device):
        output, state = reference.recurrence(
            *inputs, bounds=checks.bounds(cu_seqlens, *value.shape[:2])
        )
    return output.to(value.dtype), state.to(log_decay.dtype)


def _present(*tensors: Tensor | None) -> list[Tensor]:
    return [x for x in tensors if x is not None]


def _check(
    query: Tensor | None, key: Tensor | None, value: Tensor, *model: Tensor | None
) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...], torch.dtype]:
    """Gates, the model in the dtype that is computed in, and that dtype."""
    if value.dim() != 4:
        raise ValueError(f"value (shape {checks.shape(value)}) must be [B, T, H, V]")
    checks.check_not_empty("value", value)
    width = next((x.shape[-1] for x in (query, key) if x is not None), 1)
    if None in (query, key) and width != 1:
        name = "key" if key is None else "query"
        raise ValueError(f"{name} (=None) is ones of width 1 and the other has {width}; give both")
    for name, x in (("query", query), ("key", key)):
        wanted = (*value.shape[:3], width)
        if x is not None and x.shape != wanted:
            raise ValueError(
                f"{name} (shape {checks.shape(x)}) must be {list(wanted)} to fit value"
            )
    log_decay, frequency, weight, skip = model
    _check_model(*model)
    if len(log_decay) != value.shape[2]:
        raise ValueError(
            f"log_decay (shape {checks.shape(log_decay)}) must be [{value.shape[2]}, M] "
            "to fit value"
        )
    checks.check_tensors(
        value=value, query=query, key=key,
        log_decay=log_decay, frequency=frequency, weight=weight, skip=skip,
    )  # fmt: skip
    dtype = checks.state_dtype(*_present(query, key, value, *model))
    return (query, key), tuple(x if x is None else x.to(dtype) for x in model), dtype


def _check_model(log_decay: Tensor, frequency: Tensor, weight: Tensor, skip: Tensor | None) -> None:
    if log_decay.dim() != 2 or log_decay.shape[1] < 1:
        raise ValueError(f"log_decay (shape {checks.shape(log_decay)}) must be [H, M] with M >= 1")
    heads, count = log_decay.shape
    wanted = {"frequency": (heads, count), "weight": (heads, count, 2), "skip": (heads,)}
    for (name, shape), x in zip(wanted.items(), (frequency, weight, skip), strict=True):
        if x is not None and x.shape != shape:
            raise ValueError(
                f"{name} (shape {checks.shape(x)}) must be {list(shape)} to fit log_decay"
            )


def _check_state(
    state: Tensor | None,
    key: Tensor | None,
    value: Tensor,
    log_decay: Tensor,
    sequences: int,
    dtype: torch.dtype,
) -> Tensor | None:
    """The given state in the precision of the computation."""
    if state is None:
        return None
    checks.check_tensors(value=value, initial_state=state)
    key_width = 1 if key is None else key.shape[3]
    wanted = (sequences, *log_decay.shape, 2, key_width, value.shape[3])
    if state.shape != wanted:
        raise ValueError(
            f"initial_state (shape {checks.shape(state)}) must be {list(wanted)} [N, H, M, 2, K, V]"
        )
    return state.to(dtype)
