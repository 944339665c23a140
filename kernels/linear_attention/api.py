"""Contract, validation and dispatch of causal linear attention with scalar decay per head.

For every head, with the state S in R^{K x V} and the normalizer z in R^K:

    S_t = exp(g_t) S_{t-1} + k_t v_t^T        z_t = exp(g_t) z_{t-1} + k_t

    o_t = scale * q_t S_t                      normalize=None
    o_t = q_t S_t / (q_t . z_t + eps)          normalize="sum"

Without decay and normalized this is linear attention (Katharopoulos et al. 2020, eq. 16-20, with
the feature map already applied); a constant g per head is retention (Sun et al. 2023); a g per
token is the scalar-gated family, Mamba-2 among it (Dao & Gu 2024).
"""

from typing import NamedTuple

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
    package=__package__,
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

    Args:
        query: [B, T, Hq, K], any floating dtype, as all inputs. B, T >= 1.
        key: [B, T, Hkv, K]. Hkv divides Hq; query head h reads key head h // (Hq // Hkv).
        value: [B, T, Hkv, V].
        log_decay: natural log of the decay, <= 0 (not checked: that would synchronise a GPU). None
            for no decay, [H] for a constant per head, [B, T, H] per token; H is Hq or Hkv. Values
            down to -inf are allowed: what lies below -104 counts as -104, which is exp() = 0 in
            float32, and gets no gradient.
        normalize: None, or "sum" to divide by the sum of the weights (query and key must then be
            nonnegative, so that the sum is).
        scale: factor on the output; ignored with normalize="sum", where it cancels.
        eps: added to the sum of the weights.
        initial_state: state before the first token, shaped as LinearAttentionState says.
        return_state: also return the state after the last token.
        cu_seqlens: [N + 1] integers that rise from 0 to T: the bounds of N sequences packed in one
            row (B = 1). Each has its own state and sees no other; a sequence may be empty. The
            torch backend reads them on the host; triton does not, and trusts bounds on a GPU.
        chunk_size: tokens per chunk in torch, >= 1; it changes speed and rounding only. Triton has
            its own chunks.
        backend: "auto", "torch", "triton" or "reference" (float64, token by token). "auto" takes
            triton for float32 and 16-bit inputs on a GPU that it can use, and torch for all else.
            A backend that is asked for by name runs or raises.

    Returns:
        Output [B, T, Hq, V] in value.dtype, and the final state or None. Everything is computed in
        float32 (float64 for float64 inputs), also under autocast. Gradients flow to and from all
        tensors, the states included; second derivatives need backend="reference".

    Raises:
        ValueError: shapes, sizes or names that do not fit, or a backend that cannot run.
    """
    checks.check_positive(chunk_size=chunk_size)
    inputs = _inputs(
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
    """The same function token by token; for decoding, where T = 1 is one short step.

    Arguments, results and errors are those of `chunk_linear_attention`, and one more:

    in_place: write the final state into the tensors of initial_state and return those tensors, so
        that a step allocates no state. They must be contiguous, in the dtypes of the final state,
        and need no gradient. Otherwise the given state is not changed.

    With backend="triton", a call that needs gradients runs the chunked kernels.
    """
    inputs = _inputs(
        query, key, value, log_decay, initial_state, None, normalize, scale, eps, CHUNK, backend
    )
    return OPERATOR.run_by_token(inputs, "initial_state", initial_state, return_state, in_place)


def _inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    state: LinearAttentionState | None,
    cu_seqlens: Tensor | None,
    normalize: str | None,
    scale: float,
    eps: float,
    chunk_size: int,
    backend: str,
) -> Inputs:
    """The arguments, checked, with the state in the precision of the computation."""
    checks.check_heads(query, key, value)
    checks.check_tensors(query=query, key=key, value=value, log_decay=log_decay)
    if log_decay is not None:
        _check_log_decay(query, key, log_decay)
    if normalize not in (None, "sum"):
        raise ValueError(checks.unknown("normalize", normalize, ("None", "sum")))
    count = checks.check_packing("query", query, cu_seqlens)
    memory = normalizer = None
    if state is not None:
        heads = key.shape[2] if log_decay is None else log_decay.shape[-1]
        shape = (count, heads, key.shape[3], value.shape[3])
        memory, normalizer = _check_state(state, shape, normalize, query, key, value)
    backend = choose(OPERATION, backend, query, key, value)
    return Inputs(
        query, key, value, log_decay, memory, normalizer, cu_seqlens, normalize == "sum", scale,
        eps, chunk_size, backend,
    )  # fmt: skip


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
    state: LinearAttentionState,
    shape: tuple[int, ...],
    normalize: str | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """Memory and normalizer in the precision of the computation."""
    memory, normalizer = state
    dtype = checks.state_dtype(query, key, value)
    memory = checks.check_state(
        "initial_state.memory", memory, shape, "[N, H, K, V]", dtype, query=query
    )
    if (normalizer is None) != (normalize is None):
        given = "None" if normalizer is None else checks.shape(normalizer)
        raise ValueError(
            f"initial_state.normalizer (={given}) must be given exactly when normalize "
            f"(={normalize!r}) is 'sum'"
        )
    name = "initial_state.normalizer"
    return memory, checks.check_state(name, normalizer, shape[:3], "[N, H, K]", dtype, query=query)
