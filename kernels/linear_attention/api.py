"""Contract, validation and dispatch of causal linear attention with scalar decay per head.

For every head, with the state S in R^{K x V} and the normalizer z in R^K:

    S_t = exp(g_t) S_{t-1} + k_t v_t^T        z_t = exp(g_t) z_{t-1} + k_t

    o_t = scale * q_t S_t                      normalize=None
    o_t = q_t S_t / (q_t . z_t + eps)          normalize="sum"

Without decay and normalized this is linear attention (Katharopoulos et al. 2020, eq. 16-20, with
the feature map already applied); a constant g per head is retention (Sun et al. 2023); a g per
token is the scalar-gated family, Mamba-2 among it (Dao & Gu 2024).
"""

import difflib
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from supra.kernels.linear_attention import reference
from supra.kernels.linear_attention import torch as torch_backend

BACKENDS = ("auto", "torch", "triton", "reference")


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
        query: [B, T, Hq, K], any floating dtype, as all inputs. T >= 1.
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
            (B = 1); empty sequences are allowed. Each has its own state; none crosses a bound. It
            is read on the host: keep it on the CPU to spare a GPU the synchronisation.
        chunk_size: tokens a chunk, >= 1. Changes speed and rounding only.
        backend: "auto", "torch", "triton" or "reference" (float64, token by token). "auto" takes
            "torch" on every device. A backend that cannot run raises; none falls back to another.

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
    bounds = _sequence_bounds(cu_seqlens, query)
    backends = {
        "torch": partial(torch_backend.chunk, bounds=bounds, chunk_size=chunk_size),
        "reference": partial(reference.recurrence, bounds=bounds),
    }
    start = _initial_state(initial_state, normalize, query, key, value, log_decay, len(bounds) - 1)
    with torch_backend.without_autocast(query.device):
        output, state = _choose(backend, backends)(
            query, key, value, log_decay, start, scale=scale, eps=eps
        )
    return output.to(value.dtype), _like(state, start) if return_state else None


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
    backend: str = "auto",
) -> tuple[Tensor, LinearAttentionState | None]:
    """The same function token by token; for decoding, where T = 1 is one short step.

    Arguments, results and errors are those of `chunk_linear_attention`. The state that is passed in
    is not changed.
    """
    _check_inputs(query, key, value, log_decay)
    bounds = _sequence_bounds(None, query)
    backends = {
        "torch": torch_backend.recurrent,
        "reference": partial(reference.recurrence, bounds=bounds),
    }
    start = _initial_state(initial_state, normalize, query, key, value, log_decay, len(bounds) - 1)
    with torch_backend.without_autocast(query.device):
        output, state = _choose(backend, backends)(
            query, key, value, log_decay, start, scale=scale, eps=eps
        )
    return output.to(value.dtype), _like(state, start) if return_state else None


def _choose(backend: str, backends: dict[str, Callable]) -> Callable:
    """The one rule: "auto" is torch on every device."""
    if backend == "triton":
        raise ValueError(
            "backend (='triton') cannot run: this version has no Triton kernel for "
            "linear_attention; use 'auto' or 'torch'"
        )
    if backend not in BACKENDS:
        raise ValueError(_unknown("backend", backend, BACKENDS))
    return backends["torch" if backend == "auto" else backend]


def _unknown(name: str, value: object, choices: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(str(value), choices, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {name} {value!r}: {hint}(known: {', '.join(choices)})"


def _check_inputs(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None) -> None:
    tensors = {"query": query, "key": key, "value": value}
    for name, tensor in tensors.items():
        if tensor.dim() != 4:
            raise ValueError(f"{name} (shape {_shape(tensor)}) must be [B, T, H, D]")
    if log_decay is not None:
        tensors["log_decay"] = log_decay
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} (dtype {tensor.dtype}) must be floating point; convert it")
        if tensor.device != query.device:
            raise ValueError(f"{name} (on {tensor.device}) must be on {query.device}, as query is")
    batch, length, heads, width = query.shape
    kv_heads = key.shape[2]
    if length < 1:
        raise ValueError(f"query (shape {_shape(query)}) must have at least one token")
    if key.shape != (batch, length, kv_heads, width):
        raise ValueError(
            f"key (shape {_shape(key)}) must be [{batch}, {length}, Hkv, {width}] to fit query"
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"value (shape {_shape(value)}) must be [{batch}, {length}, {kv_heads}, V] to fit key"
        )
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(
            f"query heads (={heads}) must be a multiple of key heads (={kv_heads}); "
            "query head h reads key head h // (Hq // Hkv)"
        )
    if log_decay is not None:
        _check_log_decay(log_decay, batch, length, heads, kv_heads)


def _check_log_decay(log_decay: Tensor, batch: int, length: int, heads: int, kv_heads: int) -> None:
    lead, last = log_decay.shape[:-1], log_decay.shape[-1:]
    if lead not in ((), (batch, length)) or last not in ((heads,), (kv_heads,)):
        choice = f"{heads}" if heads == kv_heads else f"{heads} (query) or {kv_heads} (key)"
        raise ValueError(
            f"log_decay (shape {_shape(log_decay)}) must be [H] or [{batch}, {length}, H] "
            f"with H = {choice} heads"
        )


def _sequence_bounds(cu_seqlens: Tensor | None, query: Tensor) -> list[int]:
    """First token of every sequence in the flattened [B * T] tokens, and the end."""
    batch, length = query.shape[:2]
    if cu_seqlens is None:
        return [row * length for row in range(batch + 1)]
    if batch != 1:
        raise ValueError(
            f"query (batch {batch}) must have one row when cu_seqlens is given; "
            "pack all sequences into it"
        )
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.is_floating_point():
        raise ValueError(
            f"cu_seqlens (shape {_shape(cu_seqlens)}, {cu_seqlens.dtype}) must be [N + 1] integers "
            "with N >= 1"
        )
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != length:
        raise ValueError(
            f"cu_seqlens (from {bounds[0]} to {bounds[-1]}) must go from 0 to T (={length})"
        )
    for i, (begin, end) in enumerate(pairwise(bounds)):
        if begin > end:
            raise ValueError(f"cu_seqlens (={begin} then {end} at index {i + 1}) must not decrease")
    return bounds


def _initial_state(
    state: LinearAttentionState | None,
    normalize: str | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    sequences: int,
) -> LinearAttentionState:
    """The given state, checked and in the precision of the computation, or zeros."""
    if normalize not in (None, "sum"):
        raise ValueError(_unknown("normalize", normalize, ("None", "sum")))
    dtypes = {query.dtype, key.dtype, value.dtype}
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    heads = key.shape[2] if log_decay is None else log_decay.shape[-1]
    shape = (sequences, heads, key.shape[3], value.shape[3])
    if state is None:
        zeros = query.new_zeros(shape, dtype=dtype)
        return LinearAttentionState(zeros, zeros[..., 0] if normalize else None)
    memory, normalizer = state
    if memory.shape != shape:
        raise ValueError(
            f"initial_state.memory (shape {_shape(memory)}) must be {list(shape)} [N, H, K, V]"
        )
    if (normalizer is None) != (normalize is None):
        raise ValueError(
            f"initial_state.normalizer (={'None' if normalizer is None else _shape(normalizer)}) "
            f"must be given exactly when normalize (={normalize!r}) is 'sum'"
        )
    if normalizer is not None and normalizer.shape != shape[:3]:
        raise ValueError(
            f"initial_state.normalizer (shape {_shape(normalizer)}) must be {list(shape[:3])} "
            "[N, H, K]"
        )
    return LinearAttentionState(*(part if part is None else part.to(dtype) for part in state))


def _like(state: tuple[Tensor, Tensor | None], start: LinearAttentionState) -> LinearAttentionState:
    parts = (part if part is None else part.to(start.memory.dtype) for part in state)
    return LinearAttentionState(*parts)


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
