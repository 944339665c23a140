"""Contract, validation and dispatch of causal linear attention with a decay per key channel.

For every head, with the state S in R^{K x V} and the log of the decay g_t in R^K:

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T

    o_t = scale * q_t S_t                                bonus=None
    o_t = scale * q_t (S_{t-1} + diag(u) k_t v_t^T)      bonus=u

The first is gated linear attention (GLA, Yang et al. 2023, eq. 3). The second is the "wkv" of
RWKV-6 (Peng et al. 2024, eq. 19), which reads the state before the token's own decay and insertion,
and weighs the token itself by u.
"""

import torch
from torch import Tensor

from supra.kernels import checks
from supra.kernels.backends import choose, without_autocast
from supra.kernels.gated_linear_attention import operator, reference

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
        query: [B, T, Hq, K], any floating dtype, as all inputs. T >= 1.
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
    _check_state(initial_state, query, key, value, sequences)
    backend = choose(OPERATION, backend, query, key, value, log_decay)
    inputs = (query, key, value, log_decay, bonus, initial_state)
    if backend == "reference":
        output, state = _reference(*inputs, cu_seqlens, scale)
    else:
        output, state = operator.forward(*inputs, cu_seqlens, scale, chunk_size, backend)
    return output, state if return_state else None


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

    Arguments, results and errors are those of `chunk_gated_linear_attention`. The triton backend
    has no gradients here, so "auto" takes torch when they are asked for.

    in_place: write the final state over initial_state, which must be contiguous and in the dtype of
        the state, and return that; without gradients. Otherwise initial_state is not changed.
    """
    _check_inputs(query, key, value, log_decay, bonus)
    _check_state(initial_state, query, key, value, len(query))
    inputs = (query, key, value, log_decay, bonus, initial_state)
    differentiable = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in inputs
    )
    if in_place:
        _check_in_place(initial_state, checks.state_dtype(query, key, value), differentiable)
    if differentiable and backend == "auto":
        backend = "torch"
    backend = choose(OPERATION, backend, query, key, value, log_decay)
    if differentiable and backend == "triton":
        raise ValueError(
            "backend (='triton') has no gradients token by token; use 'auto', torch.no_grad() or "
            f"chunk_{OPERATION}"
        )
    if backend == "reference":
        output, state = _reference(*inputs, None, scale)
        state = initial_state.copy_(state) if in_place else state
    else:
        with without_autocast(query.device):
            output, state = operator.module(backend).recurrent(
                *inputs, scale=scale, in_place=in_place
            )
    return output, state if return_state else None


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


def _check_state(
    state: Tensor | None, query: Tensor, key: Tensor, value: Tensor, sequences: int
) -> None:
    shape = (sequences, key.shape[2], key.shape[3], value.shape[3])
    if state is None:
        return
    checks.check_tensors(query=query, initial_state=state)
    if state.shape != shape:
        raise ValueError(
            f"initial_state (shape {checks.shape(state)}) must be {list(shape)} [N, H, K, V]"
        )


def _check_in_place(state: Tensor | None, dtype: torch.dtype, differentiable: bool) -> None:
    if state is None:
        raise ValueError("in_place (=True) needs an initial_state to write into; give zeros")
    if state.dtype != dtype or not state.is_contiguous():
        raise ValueError(
            f"initial_state ({state.dtype}, strides {state.stride()}) must be contiguous and "
            f"{dtype} for in_place (=True); take what the last call returned"
        )
    if differentiable:
        raise ValueError(
            "in_place (=True) has no gradients; use torch.no_grad(), or leave in_place out"
        )
