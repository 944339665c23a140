"""What the operations check alike: shapes, heads, packed rows; one line an error."""

import difflib
from itertools import pairwise

import torch
from torch import Tensor

# exp(-104) is 0 in float32: a lower log of a decay counts as this, and gets no gradient
LOWEST_LOG_DECAY = -104.0


def shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def unknown(name: str, value: object, choices: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(str(value), choices, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {name} {value!r}: {hint}(known: {', '.join(choices)})"


def state_dtype(*tensors: Tensor) -> torch.dtype:
    """float32, or float64 when one of the inputs is."""
    double = any(x.dtype == torch.float64 for x in tensors)
    return torch.float64 if double else torch.float32


def check_tensors(**tensors: Tensor | None) -> None:
    """All floating point and on the device of the first; None is skipped."""
    first, device = next((name, x.device) for name, x in tensors.items() if x is not None)
    for name, x in tensors.items():
        if x is None:
            continue
        if not x.is_floating_point():
            raise ValueError(f"{name} (dtype {x.dtype}) must be floating point; convert it")
        if x.device != device:
            raise ValueError(f"{name} (on {x.device}) must be on {device}, as {first} is")


def check_not_empty(name: str, tensor: Tensor) -> None:
    """[B, T, ...] with B, T >= 1."""
    if 0 in tensor.shape[:2]:
        raise ValueError(f"{name} (shape {shape(tensor)}) must have at least one row and one token")


def check_heads(query: Tensor, key: Tensor, value: Tensor) -> None:
    """query [B, T, Hq, K], key [B, T, Hkv, K] and value [B, T, Hkv, V], with Hkv dividing Hq."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != 4:
            raise ValueError(f"{name} (shape {shape(x)}) must be [B, T, H, D]")
    batch, length, heads, width = query.shape
    kv_heads = key.shape[2]
    check_not_empty("query", query)
    if key.shape != (batch, length, kv_heads, width):
        raise ValueError(
            f"key (shape {shape(key)}) must be [{batch}, {length}, Hkv, {width}] to fit query"
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"value (shape {shape(value)}) must be [{batch}, {length}, {kv_heads}, V] to fit key"
        )
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(
            f"query heads (={heads}) must be a multiple of key heads (={kv_heads}); "
            "query head h reads key head h // (Hq // Hkv)"
        )


def check_packing(name: str, tensor: Tensor, cu_seqlens: Tensor | None) -> int:
    """Number of sequences in `tensor` [B, T, ...]; what cu_seqlens holds is checked in bounds()."""
    if cu_seqlens is None:
        return tensor.shape[0]
    if tensor.shape[0] != 1:
        raise ValueError(
            f"{name} (batch {tensor.shape[0]}) must have one row when cu_seqlens is given; "
            "pack all sequences into it"
        )
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.is_floating_point():
        raise ValueError(
            f"cu_seqlens (shape {shape(cu_seqlens)}, {cu_seqlens.dtype}) must be [N + 1] integers "
            "with N >= 1"
        )
    return len(cu_seqlens) - 1


def sequences(tensor: Tensor, cu_seqlens: Tensor | None) -> int:
    """Rows of `tensor` [B, T, ...], or sequences packed in its one row."""
    return len(tensor) if cu_seqlens is None else len(cu_seqlens) - 1


def bounds(cu_seqlens: Tensor | None, batch: int, length: int) -> list[int]:
    """First token of every sequence in the flattened [B * T] tokens, and the end.

    It reads cu_seqlens on the host: on a GPU that waits for the device.
    """
    if cu_seqlens is None:
        return [row * length for row in range(batch + 1)]
    found = cu_seqlens.tolist()
    if found[0] != 0 or found[-1] != length:
        raise ValueError(
            f"cu_seqlens (from {found[0]} to {found[-1]}) must go from 0 to T (={length})"
        )
    for i, (begin, end) in enumerate(pairwise(found)):
        if begin > end:
            raise ValueError(f"cu_seqlens (={begin} then {end} at index {i + 1}) must not decrease")
    return found


def check_state(
    state: Tensor | None, query: Tensor, key: Tensor, value: Tensor, sequences: int
) -> Tensor | None:
    """The given state [N, Hkv, K, V] in the precision of the computation."""
    if state is None:
        return None
    check_tensors(query=query, initial_state=state)
    wanted = (sequences, key.shape[2], key.shape[3], value.shape[3])
    if state.shape != wanted:
        raise ValueError(
            f"initial_state (shape {shape(state)}) must be {list(wanted)} [N, Hkv, K, V]"
        )
    return state.to(state_dtype(query, key, value))


def own_state(state: Tensor | None, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """A copy of the state, or zeros, for a kernel that writes into it."""
    if state is not None:
        return state.clone(memory_format=torch.contiguous_format)
    wanted = (query.shape[0], key.shape[2], key.shape[3], value.shape[3])
    return query.new_zeros(wanted, dtype=state_dtype(query, key, value))


def needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def check_in_place(
    dtype: torch.dtype, inputs: tuple[Tensor | None, ...], **states: Tensor | None
) -> None:
    """in_place=True: the given states can be written over, and nothing asks for a gradient."""
    for name, state in states.items():
        if state is None:
            raise ValueError(f"in_place (=True) needs {name} (=None) to write into; give zeros")
        if state.dtype != dtype or not state.is_contiguous():
            raise ValueError(
                f"{name} ({state.dtype}, strides {state.stride()}) must be contiguous and {dtype} "
                "for in_place (=True); take what the last call returned"
            )
    if needs_gradient(*inputs, *states.values()):
        raise ValueError(
            "in_place (=True) has no gradient; use torch.no_grad(), or leave in_place out"
        )
