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

import torch
from torch import Tensor

from supra.kernels import checks
from supra.kernels.backends import choose, without_autocast
from supra.kernels.linear_attention import operator, reference
from supra.kernels.linear_attention import torch as torch_backend

OPERATION = "linear_attention"


class LinearAttentionState(NamedTuple):
    """What the recurrence carries after the last token.

    memory: [N, H, K, V], the sum of decayed k v^T. float32, or float64 for float64 inputs.
    normalizer: [N, H, K], the sum of decayed k in the same dtype; None unless normalize="sum".

    N is the batch size, or the number of packed sequences. H is the number of heads of log_decay,
    or of the keys when there is no decay. The decay of the next token is not yet applied.
    """

    memory: Tensor
    normalizer: Tensor | None


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
    chunk_size: int = 64,
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
        cu_seqlens: [N + 1] integers 0 <= ... <= T, the bounds of N sequences packed in one row
            (B = 1); empty sequences are allowed. Each has its own state; none crosses a bound. The
            torch backend reads it on the host; Triton does not, and trusts one that is on a GPU.
        chunk_size: tokens a chunk in torch, >= 1. Changes speed and rounding only; Triton has its
            own.
        backend: "auto", "torch", "triton" or "reference" (float64, token by token). "auto" takes
            "triton" on a GPU that it runs on, for float32 and 16-bit inputs, and "torch" for all
            else. A backend that cannot run raises; none falls back to another.

    Returns:
        Output [B, T, Hq, V] in value.dtype, and the final state or None. Everything is computed in
        float32 (float64 for float64 inputs), also under autocast. Gradients flow to and from all
        tensors, the states included; second derivatives need backend="reference".

    Raises:
        ValueError: shapes, sizes or names that do not fit, or a backend that cannot run.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size (={chunk_size}) must be >= 1")
    _check_inputs(query, key, value, log_decay)
    sequences = checks.check_packing("query", query, cu_seqlens)
    state = _check_state(initial_state, normalize, query, key, value, log_decay, sequences)
    backend = choose(OPERATION, backend, query, key, value)
    if backend == "reference":
        return _reference(
            query, key, value, log_decay, state, cu_seqlens, normalize, scale, eps, return_state
        )
    output, memory, normalizer, _ = operator.forward(
        query, key, value, log_decay, *state, cu_seqlens,
        normalize == "sum", scale, eps, chunk_size, backend,
    )  # fmt: skip
    if not return_state:
        return output, None
    return output, LinearAttentionState(memory, normalizer if normalize else None)


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

    in_place: write the final state into the tensors of initial_state and return these, so that a
        step allocates no state. They must be contiguous, float32 (float64 for float64 inputs), and
        need no gradient. Otherwise the state that is passed in is not changed.

    With backend="triton", a call that needs gradients runs the chunked kernels.
    """
    _check_inputs(query, key, value, log_decay)
    state = _check_state(initial_state, normalize, query, key, value, log_decay, query.shape[0])
    backend = choose(OPERATION, backend, query, key, value)
    if in_place:
        _check_in_place(initial_state, query, key, value, log_decay)
    if backend == "reference":
        output, end = _reference(
            query, key, value, log_decay, state, None, normalize, scale, eps, return_state=True
        )
        if in_place:
            for given, part in zip(state, end, strict=True):
                if part is not None:
                    given.copy_(part)
            end = LinearAttentionState(*state)
        return output, end if return_state else None
    if backend == "torch":
        with without_autocast(query.device):
            output, end = torch_backend.recurrent(
                query, key, value, log_decay, state,
                normalized=normalize == "sum", scale=scale, eps=eps, in_place=in_place,
            )  # fmt: skip
        return output, LinearAttentionState(*end) if return_state else None
    if checks.needs_gradient(query, key, value, log_decay, *state):
        output, *end, _ = operator.forward(
            query, key, value, log_decay, *state, None,
            normalize == "sum", scale, eps, 64, backend,
        )  # fmt: skip
        end = end[0], end[1] if normalize else None
    else:
        end = state if in_place else _own_state(state, query, key, value, log_decay, normalize)
        output = operator.step(query, key, value, log_decay, *end, scale, eps)
    return output, LinearAttentionState(*end) if return_state else None


def _reference(
    query, key, value, log_decay, state, cu_seqlens, normalize, scale, eps, return_state
):
    bounds = checks.bounds(cu_seqlens, *query.shape[:2])
    with without_autocast(query.device):
        output, end = reference.recurrence(
            query, key, value, log_decay, state,
            bounds=bounds, normalized=normalize == "sum", scale=scale, eps=eps,
        )  # fmt: skip
    if not return_state:
        return output.to(value.dtype), None
    dtype = checks.state_dtype(query, key, value)
    state = LinearAttentionState(*(part if part is None else part.to(dtype) for part in end))
    return output.to(value.dtype), state


def _check_inputs(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None) -> None:
    checks.check_heads(query, key, value)
    checks.check_tensors(query=query, key=key, value=value, log_decay=log_decay)
    if log_decay is None:
        return
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
    normalize: str | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    sequences: int,
) -> tuple[Tensor | None, Tensor | None]:
    """Memory and normalizer of the given state in the precision of the computation, or Nones."""
    if normalize not in (None, "sum"):
        raise ValueError(checks.unknown("normalize", normalize, ("None", "sum")))
    if state is None:
        return None, None
    heads = key.shape[2] if log_decay is None else log_decay.shape[-1]
    shape = (sequences, heads, key.shape[3], value.shape[3])
    memory, normalizer = state
    checks.check_tensors(query=query, initial_state=memory, normalizer=normalizer)
    if memory.shape != shape:
        raise ValueError(
            f"initial_state.memory (shape {checks.shape(memory)}) must be {list(shape)} "
            "[N, H, K, V]"
        )
    if (normalizer is None) != (normalize is None):
        given = "None" if normalizer is None else checks.shape(normalizer)
        raise ValueError(
            f"initial_state.normalizer (={given}) must be given exactly when normalize "
            f"(={normalize!r}) is 'sum'"
        )
    if normalizer is not None and normalizer.shape != shape[:3]:
        raise ValueError(
            f"initial_state.normalizer (shape {checks.shape(normalizer)}) must be "
            f"{list(shape[:3])} [N, H, K]"
        )
    dtype = checks.state_dtype(query, key, value)
    return memory.to(dtype), None if normalizer is None else normalizer.to(dtype)


def _own_state(
    state: tuple[Tensor | None, Tensor | None],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    normalize: str | None,
) -> tuple[Tensor, Tensor | None]:
    """A copy of the state, or zeros, for a kernel that writes into it."""
    if state[0] is not None:
        memory, normalizer = (
            x if x is None else x.clone(memory_format=torch.contiguous_format) for x in state
        )
        return memory, normalizer
    heads = key.shape[2] if log_decay is None else log_decay.shape[-1]
    shape = (query.shape[0], heads, key.shape[3], value.shape[3])
    memory = query.new_zeros(shape, dtype=checks.state_dtype(query, key, value))
    return memory, memory.new_zeros(shape[:3]) if normalize else None


def _check_in_place(
    state: LinearAttentionState | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
) -> None:
    given = {"initial_state": None}
    if state is not None:
        names = ("initial_state.memory", "initial_state.normalizer")
        given = {name: x for name, x in zip(names, state, strict=True) if x is not None}
    dtype = checks.state_dtype(query, key, value)
    checks.check_in_place(dtype, (query, key, value, log_decay), **given)
