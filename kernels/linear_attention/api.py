"""Contract, validation and dispatch of causal linear attention with scalar decay per head.

For every head, with the state S in R^{K x V} and the normalizer z in R^K:

    S_t = exp(g_t) S_{t-1} + k_t v_t^T        z_t = exp(g_t) z_{t-1} + k_t

    o_t = scale * q_t S_t                      normalize=None
    o_t = q_t S_t / (q_t . z_t + eps)          normalize="sum"

Without decay and normalized this is linear attention (Katharopoulos et al. 2020, eq. 16-20, with
the feature map already applied); a constant g per head is retention (Sun et al. 2023); a g per
token is the scalar-gated family, Mamba-2 among it (Dao & Gu 2024).
"""

from typing import Any, NamedTuple

from torch import Tensor

from supra.kernels import checks
from supra.kernels.backends import choose
from supra.kernels.linear_attention import reference
from supra.kernels.linear_attention import torch as torch_backend
from supra.kernels.linear_attention.inputs import Inputs
from supra.kernels.operators import Operator

OPERATION = "linear_attention"
CHUNK = 64  # tokens, in torch


class LinearAttentionState(NamedTuple):
    """What the recurrence carries after the last token.

    memory: [N, H, K, V], the sum of decayed k v^T. float32, or float64 for float64 inputs.
    normalizer: [N, H, K], the sum of decayed k in the same dtype; None unless normalize="sum".

    N is the batch size, or the number of packed sequences. H is the number of heads of log_decay,
    or of the keys when there is no decay. The decay of the next token is not yet applied.
    """

    memory: Tensor
    normalizer: Tensor | None


OPERATOR = Operator(
    OPERATION,
    Inputs,
    torch_backend,
    reference,
    state=LinearAttentionState,
    results=("output", "memory", "normalizer", "weights"),
    saved=("output", "weights"),
)


def chunk_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    log_decay: Tensor | None = None,
    normalize: str | None = None,
    scale: float = 1.0,
    eps: float = 1e-6,
    initial_state: LinearAttentionState | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = CHUNK,
    backend: str = "auto",
) -> tuple[Tensor, LinearAttentionState | None]:
    """Causal linear attention over whole sequences, in chunks; for training and prefill.

    Other arguments, dtypes, gradients and errors (ValueError): see `supra.kernels.checks`.

    Args:
        query: [B, T, Hq, K].
        key: [B, T, Hkv, K]. Hkv divides Hq; query head h reads key head h // (Hq // Hkv).
        value: [B, T, Hkv, V].
        log_decay: natural log of the decay, <= 0 (not checked). None for no decay, [H] for a
            constant per head, [B, T, H] per token; H is Hq or Hkv. Values down to -inf are allowed:
            what lies below -104 counts as -104, which is exp() = 0 in float32, and gets no
            gradient.
        normalize: None, or "sum" to divide by the sum of the weights (query and key must then be
            nonnegative, so that the sum is).
        scale: factor on the output; ignored with normalize="sum", where it cancels.
        eps: added to the sum of the weights.

    Returns:
        Output [B, T, Hq, V] in value.dtype, and the final state or None.
    """
    inputs = _checked(
        query, key, value, log_decay, initial_state, cu_seqlens, normalize, scale, eps, chunk_size,
        backend,
    )  # fmt: skip
    return OPERATOR.run(inputs, return_state)


def recurrent_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    log_decay: Tensor | None = None,
    normalize: str | None = None,
    scale: float = 1.0,
    eps: float = 1e-6,
    initial_state: LinearAttentionState | None = None,
    return_state: bool = False,
    in_place: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, LinearAttentionState | None]:
    """`chunk_linear_attention` token by token; for in_place see `supra.kernels.checks`."""
    inputs = _checked(
        query, key, value, log_decay, initial_state, None, normalize, scale, eps, CHUNK, backend
    )
    return OPERATOR.run_by_token(inputs, "initial_state", initial_state, return_state, in_place)


def _checked(*arguments: Any) -> Inputs:
    """The arguments, with the state in the precision of the computation and the backend chosen."""
    *tensors, state, cu_seqlens, normalize, scale, eps, chunk_size, backend = arguments
    query, key, value, log_decay = tensors
    checks.check_heads(query, key, value)
    checks.check_tensors(query=query, key=key, value=value, log_decay=log_decay)
    checks.check_positive(chunk_size=chunk_size)
    if log_decay is not None:
        _check_log_decay(query, key, log_decay)
    if normalize not in (None, "sum"):
        raise ValueError(checks.unknown("normalize", normalize, ("None", "sum")))
    count = checks.check_packing("query", query, cu_seqlens)
    heads = key.shape[2] if log_decay is None else log_decay.shape[-1]
    shape = (count, heads, key.shape[3], value.shape[3])
    state = _check_state(state, shape, normalize, query, key, value)
    backend, normalized = choose(OPERATION, backend, query, key, value), normalize is not None
    return Inputs(*tensors, *state, cu_seqlens, normalized, scale, eps, chunk_size, backend)


def _check_log_decay(query: Tensor, key: Tensor, log_decay: Tensor) -> None:
    batch, length, heads = query.shape[:3]
    kv_heads = key.shape[2]
    lead, last = log_decay.shape[:-1], log_decay.shape[-1:]
    if lead not in ((), (batch, length)) or last not in ((heads,), (kv_heads,)):
        choice = f"{heads}" if heads == kv_heads else f"{heads} (query) or {kv_heads} (key)"
        raise ValueError(
            f"log_decay (shape {checks.shape(log_decay)}) must be [H] or [{batch}, {length}, H] "
            f"with H = {choice} heads"
        )


def _check_state(
    state: LinearAttentionState | None,
    shape: tuple[int, ...],
    normalize: str | None,
    *tensors: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    """Memory and normalizer in the precision of the computation, which has these tensors."""
    (memory, normalizer), dtype = state or (None, None), checks.state_dtype(*tensors)
    if state is not None and (normalizer is None) != (normalize is None):
        given = "None" if normalizer is None else checks.shape(normalizer)
        raise ValueError(
            f"initial_state.normalizer (={given}) must be given exactly when normalize "
            f"(={normalize!r}) is 'sum'"
        )
    return tuple(
        checks.check_state(f"initial_state.{name}", x, wanted, axes, dtype, query=tensors[0])
        for name, x, wanted, axes in (
            ("memory", memory, shape, "[N, H, K, V]"),
            ("normalizer", normalizer, shape[:3], "[N, H, K]"),
        )
    )
