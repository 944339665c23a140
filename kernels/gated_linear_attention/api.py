"""Contract, validation and dispatch of causal linear attention with a decay per key channel.

For every head, with the state S in R^{K x V} and the log of the decay g_t in R^K:

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T

    o_t = scale * q_t S_t                                bonus=None
    o_t = scale * q_t (S_{t-1} + diag(u) k_t v_t^T)      bonus=u

The first is gated linear attention (GLA, Yang et al. 2023, eq. 3). The second is the "wkv" of
RWKV-6 (Peng et al. 2024, eq. 19), which reads the state before the token's own decay and insertion,
and weighs the token itself by u.
"""

from torch import Tensor

from supra.kernels import checks
from supra.kernels.backends import choose, without_autocast
from supra.kernels.gated_linear_attention import operator, reference
from supra.kernels.gated_linear_attention import torch as torch_backend

OPERATION = "gated_linear_attention"


def chunk_gated_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    log_decay: Tensor,
    bonus: Tensor | None = None,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Causal linear attention with a decay per key channel over whole sequences, in chunks.

    Args:
        query: [B, T, Hq, K], any floating dtype, as all inputs. B, T >= 1.
        key: [B, T, Hkv, K]. Hkv divides Hq; query head h reads key head h // (Hq // Hkv).
        value: [B, T, Hkv, V].
        log_decay: [B, T, Hkv, K], natural log of the decay, <= 0 (not checked: that would
            synchronise a GPU). Values down to -inf are allowed; a decay below 1e-30 counts as 0.
        bonus: None for GLA, or [Hq, K], the weight of the current token in RWKV-6.
        scale: factor on the output.
        initial_state: [N, Hkv, K, V], the state before the first token; None for zeros. N is the
            batch size, or the number of packed sequences.
        return_state: also return the state after the last token. The decay of the next token is not
            yet applied to it.
        cu_seqlens: [N + 1] integers 0 <= ... <= T, the bounds of N sequences packed in one row
            (B = 1); empty sequences are allowed. Each has its own state; none crosses a bound. The
            torch backend reads it on the host: keep it on the CPU to spare a GPU the
            synchronisation.
        chunk_size: tokens a chunk of the torch backend, >= 1; powers of two are the fast ones.
            Changes speed and rounding only.
        backend: "auto", "torch", "triton" or "reference" (float64, token by token). "auto" is
            triton on a GPU where triton can run, torch elsewhere. A backend that cannot run raises;
            none falls back to another.

    Returns:
        Output [B, T, Hq, V] in value.dtype, and the final state or None. The state is float32, or
        float64 for float64 inputs; so is every computation, also under autocast. Gradients flow to
        and from all tensors, the states included; second derivatives need backend="reference".

    Raises:
        ValueError: shapes, sizes or names that do not fit, or a backend that cannot run.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size (={chunk_size}) must be >= 1")
    _check_inputs(query, key, value, log_decay, bonus)
    sequences = checks.check_packing("query", query, cu_seqlens)
    state = checks.check_state(initial_state, query, key, value, sequences)
    backend = choose(OPERATION, backend, query, key, value, log_decay)
    inputs = (query, key, value, log_decay, bonus, state)
    if backend == "reference":
        output, end = _reference(*inputs, cu_seqlens, scale)
    else:
        output, end = operator.forward(*inputs, cu_seqlens, scale, chunk_size, backend)
    return output, end if return_state else None


def recurrent_gated_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    log_decay: Tensor,
    bonus: Tensor | None = None,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    in_place: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """The same function token by token; for decoding, where T = 1 is one short step.

    Arguments, results and errors are those of `chunk_gated_linear_attention`, and one more:

    in_place: write the final state into the tensor initial_state and return that, so that a step
        allocates no state. It must be contiguous, float32 (float64 for float64 inputs), and need no
        gradient. Otherwise the state that is passed in is not changed.

    With backend="triton", a call that needs gradients runs the chunked kernels.
    """
    _check_inputs(query, key, value, log_decay, bonus)
    state = checks.check_state(initial_state, query, key, value, query.shape[0])
    inputs = (query, key, value, log_decay, bonus)
    if in_place:
        dtype = checks.state_dtype(query, key, value)
        checks.check_in_place(dtype, inputs, initial_state=initial_state)
    backend = choose(OPERATION, backend, query, key, value, log_decay)
    if backend == "reference":
        output, end = _reference(*inputs, state, None, scale)
        end = initial_state.copy_(end) if in_place else end
    elif backend == "torch":
        with without_autocast(query.device):
            output, end = torch_backend.recurrent(*inputs, state, scale=scale, in_place=in_place)
    elif checks.needs_gradient(*inputs, state):
        output, end = operator.forward(*inputs, state, None, scale, 64, backend)
    else:
        end = state if in_place else checks.own_state(state, query, key, value)
        output = operator.step(*inputs, end, scale)
    return output, end if return_state else None


def _reference(query, key, value, log_decay, bonus, state, cu_seqlens, scale):
    with without_autocast(query.device):
        output, state = reference.recurrence(
            query, key, value, log_decay, bonus, state,
            bounds=checks.bounds(cu_seqlens, *query.shape[:2]), scale=scale,
        )  # fmt: skip
    return output.to(value.dtype), state.to(checks.state_dtype(query, key, value))


def _check_inputs(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, bonus: Tensor | None
) -> None:
    checks.check_heads(query, key, value)
    checks.check_tensors(query=query, key=key, value=value, log_decay=log_decay, bonus=bonus)
    if log_decay.shape != key.shape:
        raise ValueError(
            f"log_decay (shape {checks.shape(log_decay)}) must be {checks.shape(key)}, as key is: "
            "a decay per token, key head and channel"
        )
    shape = (query.shape[2], query.shape[3])
    if bonus is not None and bonus.shape != shape:
        raise ValueError(
            f"bonus (shape {checks.shape(bonus)}) must be {list(shape)} [Hq, K] to fit query"
        )
