"""Contract, validation and dispatch of the causal convolution with a long kernel.

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

The taps of the kernel are the outputs for an impulse: a value of 1 and then zeros, without gates.
"""

from typing import Any

from torch import Tensor

from supra.kernels import checks
from supra.kernels.backends import choose
from supra.kernels.long_conv import reference
from supra.kernels.long_conv import torch as torch_backend
from supra.kernels.long_conv.inputs import Inputs
from supra.kernels.operators import Operator

OPERATION = "long_conv"
OPERATOR = Operator("ssm_conv", Inputs, torch_backend, reference)
CHUNK, FEW_TOKENS = 64, 4096  # few tokens do not repay larger matrices


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
    named = dict(zip(("log_decay", "frequency", "weight", "skip"), model, strict=True))
    _check_model(value.shape[2], **named)
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


def _check_model(heads: int, log_decay: Tensor, **others: Tensor | None) -> None:
    if log_decay.dim() != 2 or len(log_decay) != heads or log_decay.shape[1] < 1:
        raise ValueError(
            f"log_decay (shape {checks.shape(log_decay)}) must be [{heads}, M] to fit value, "
            "with M >= 1"
        )
    modes = tuple(log_decay.shape)
    for name, wanted in (("frequency", modes), ("weight", (*modes, 2)), ("skip", modes[:1])):
        checks.check_shape(name, others[name], wanted, "to fit log_decay")
