"""What all operations share: arguments, results and errors; and the checks of them.

An operation says where it differs. Arguments that mean the same everywhere:

- `initial_state`: [N, ...], the state before the first token; None for zeros. N is the batch size,
  or the number of packed sequences.
- `return_state`: also return the state after the last token. The decay of the next token is not yet
  applied to it.
- `cu_seqlens`: [N + 1] integers that rise from 0 to T: the bounds of N sequences packed in one row
  (B = 1). Each has its own state and sees no other; a sequence may be empty. The torch backend
  reads them on the host; triton does not, and trusts bounds on a GPU.
- `chunk_size`: tokens per chunk in torch, >= 1. It changes speed and rounding only; powers of two
  are fastest. Triton has its own chunks.
- `in_place`, in the recurrent forms: write the final state into the tensors of `initial_state` and
  return those, so that a step allocates no state. They must be contiguous, in the dtypes of the
  final state, and need no gradient. Otherwise the given state is not changed.
- `backend`: "auto", "torch", "triton" or "reference" (float64, token by token). "auto" takes triton
  for float32 and 16-bit inputs on a GPU that it can use, and torch for all else. A backend that is
  asked for by name runs or raises. In the recurrent forms, a call of triton that needs gradients
  runs the chunked kernels.

Tensors are of any floating dtype, with at least one row and one token. The output has the dtype of
the value. The state is float32, or float64 for float64 inputs, and so is every computation, also
under autocast. Gradients flow to and from all tensors, the states included; second derivatives need
backend="reference".

ValueError is raised for shapes, sizes or names that do not fit, and for a backend that cannot run.
What only the numbers in a tensor show, as a decay above 1, is not checked: to look at them would
make a GPU wait.
"""

import difflib
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

# exp(-104) is 0 in float32: a lower log of a decay counts as this, and gets no gradient
LOWEST_LOG_DECAY = -104.0
MAX_KEY_CHANNELS = 256  # of the Triton kernels that hold all of them


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


def check_shape(name: str, tensor: Tensor | None, wanted: tuple[int, ...], why: str) -> None:
    """why: what the sizes are, or what they have to fit; None is skipped."""
    if tensor is not None and tensor.shape != wanted:
        raise ValueError(f"{name} (shape {shape(tensor)}) must be {list(wanted)} {why}")


def check_positive(**sizes: int | None) -> None:
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{name} (={size}) must be >= 1")


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


def limit_of_all_channels(key: Tensor) -> str | None:
    """Why Triton kernels that hold all channels of the keys at once do not take them."""
    if key.shape[3] <= MAX_KEY_CHANNELS:
        return None
    return (
        f"key (width {key.shape[3]}) must have at most {MAX_KEY_CHANNELS} channels, which its "
        "kernels hold all at once; use 'auto' or 'torch'"
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
    return sequences(tensor, cu_seqlens)


def sequences(tensor: Tensor, cu_seqlens: Tensor | None) -> int:
    """Rows of `tensor` [B, T, ...], or sequences packed in its one row.

    By shape, not len(), which would make a constant of a size that torch.export leaves open.
    """
    return tensor.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


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
    name: str,
    state: Tensor | None,
    wanted: tuple[int, ...],
    axes: str,
    dtype: torch.dtype,
    **first: Tensor,
) -> Tensor | None:
    """The given state in `dtype`. first: the input, by its name, whose device it must be on."""
    if state is None:
        return None
    check_tensors(**first, **{name: state})
    check_shape(name, state, wanted, axes)
    return state.to(dtype)


def check_heads_inputs(x: Any) -> Tensor | None:
    """Check what operations with one state [N, Hkv, K, V] share.

    x: Inputs whose fields up to `state` are tensors, query, key and value the first ones. Returns
    the state in the precision of the computation.
    """
    check_heads(*x[:3])
    check_tensors(**dict(zip(x._fields[: x._fields.index("state")], x, strict=False)))
    check_positive(chunk_size=x.chunk_size)
    count = check_packing("query", x.query, x.cu_seqlens)
    wanted, dtype = (count, *x.key.shape[2:], x.value.shape[3]), state_dtype(*x[:3])
    return check_state("initial_state", x.state, wanted, "[N, Hkv, K, V]", dtype, query=x.query)


def given_or_zeros(state: Tensor | None, inputs: Any) -> Tensor:
    """The state, or zeros shaped as the final state of the operation that takes `inputs`."""
    return torch.zeros_like(inputs.empty_results()[1]) if state is None else state


def copy_or_zeros(state: Tensor | None, like: Tensor | None) -> Tensor | None:
    """A copy of the state to write into, or zeros; None where `like` is None too."""
    if state is not None:
        return state.clone(memory_format=torch.contiguous_format)
    return like if like is None else torch.zeros_like(like)


def d_log_decay(log_decay: Tensor | None, found: Tensor) -> Tensor | None:
    """Gradient of log_decay [H] or [B, T, H] from that of the logs of all tokens, [B, T, H]."""
    if log_decay is None:
        return None
    found = found.sum((0, 1)) if log_decay.dim() == 1 else found
    return found.masked_fill(log_decay < LOWEST_LOG_DECAY, 0).to(log_decay.dtype)


def present(*tensors: Tensor | None) -> list[Tensor]:
    return [x for x in tensors if x is not None]


def needs_gradient(*inputs: Any) -> bool:
    """Whether one of them is a tensor that gets a gradient."""
    return torch.is_grad_enabled() and any(
        isinstance(x, Tensor) and x.requires_grad for x in inputs
    )


def check_in_place(inputs: Any, fields: tuple[str, ...], name: str, state: Any) -> None:
    """in_place=True: the given state can be written over, and nothing asks for a gradient.

    fields: those of inputs that hold the state in the dtype that is computed in. state: one tensor,
    or a tuple of as many as there are fields.
    """
    states, converted = {name: state}, getattr(inputs, fields[0])
    if isinstance(state, tuple):
        parts = zip(fields, state, strict=True)
        states = {f"{name}.{field}": x for field, x in parts if x is not None}
    for name, state in states.items():
        if state is None:
            raise ValueError(f"in_place (=True) needs {name} (=None) to write into; give zeros")
        if state.dtype != converted.dtype or not state.is_contiguous():
            raise ValueError(
                f"{name} ({state.dtype}, strides {state.stride()}) must be contiguous and "
                f"{converted.dtype} for in_place (=True); take what the last call returned"
            )
    if needs_gradient(*inputs, *states.values()):
        raise ValueError(
            "in_place (=True) has no gradient; use torch.no_grad(), or leave in_place out"
        )
