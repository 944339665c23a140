"""How Triton kernels are launched: a static table of tilings, and one call that every launch makes.

Nothing is tuned at run time: a tiling is looked up by the kind of GPU and the width of the heads.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from supra.kernels import checks
from supra.kernels.backends import interpreting
from supra.kernels.chunks import count_chunks

# "small" is for less than 100 KiB of shared memory a block; its kernels fit into 64 KiB
TARGETS = ("sm_80", "sm_90", "sm_100", "small")
SMALL_SHARED_MEMORY = 100 * 1024
ALL_CHANNELS = 1 << 16  # of a head: tiling() takes what the head has


class Tiling(NamedTuple):
    """How one kernel is cut: channels of a key and of a value tile, warps and pipeline stages."""

    key: int
    value: int
    warps: int = 4
    stages: int = 2


# kernel -> target or "any" -> (widest head, tiling), narrow heads first. " float32" after a target:
# for operands of 32 bits, which take twice the registers and the shared memory
Table = Mapping[str, Mapping[str, tuple[tuple[int, Tiling], ...]]]


class Rows(NamedTuple):
    """A tensor [B, T, H, ...] as kernels take it: where it begins, and its strides."""

    data: Tensor
    batch: int
    time: int
    head: int

    @staticmethod
    def of(x: Tensor | None) -> "Rows | None":
        """For x [B, T, H, ...], or [H], the same for all tokens."""
        if x is None:
            return None
        return Rows(x, 0, 0, x.stride(0)) if x.dim() == 1 else Rows(x, *x.stride()[:3])


class Sequences(NamedTuple):
    """The sequences of a launch: `count` rows of `length` tokens, or packed in one such row.

    cu_seqlens and chunk_offsets: first token and first chunk of each, and the ends; int32, None
    where rows are not packed.
    """

    cu_seqlens: Tensor | None
    chunk_offsets: Tensor | None
    count: int
    length: int


class Launch(NamedTuple):
    """What one launch would run: the tensors and numbers, and the compile-time constants."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    tiling: Tiling


_target: str | None = None
_recorded: list[Launch] | None = None


@contextmanager
def target(name: str) -> Iterator[None]:
    """Launch with the tilings of that target, whatever the device is; in all threads."""
    global _target
    before, _target = _target, name
    try:
        yield
    finally:
        _target = before


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """List the launches instead of running them, in all threads; takes tensors on meta too."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def tiling(
    table: Table,
    kernel: str,
    key_width: int,
    value_width: int,
    device: torch.device,
    precision: str = "bf16",
) -> Tiling:
    """The row of the table for heads of these widths on that device, no tile wider than a head.

    precision: of products, as precision() gives it.
    """
    names = [_target or _target_of(device), "any"]
    if not precision.startswith("bf16"):
        names = [f"{name} float32" for name in names] + names
    rows = next(table[kernel][name] for name in names if name in table[kernel])
    width = max(key_width, value_width)
    found = next((row for widest, row in rows if width <= widest), rows[-1][1])
    key, value = (max(16, 1 << (width - 1).bit_length()) for width in (key_width, value_width))
    return found._replace(key=min(found.key, key), value=min(found.value, value))


def launch(
    kernel: Any, grid: tuple[int, ...], given: Mapping[str, Any], tiling: Tiling, **more: Any
) -> None:
    """Run kernel[grid] with those arguments that it names; compile-time ones are CAPITALS."""
    given = {**given, **more}
    given = {name: given[name] for name in kernel.arg_names}
    arguments = {name: x for name, x in given.items() if not name.isupper()}
    if _recorded is not None:
        constants = {name: x for name, x in given.items() if name.isupper()}
        _recorded.append(Launch(kernel, grid, arguments, constants, tiling))
        return
    _run(kernel, grid, given, tiling)


def _run(kernel: Any, grid: tuple[int, ...], given: Mapping[str, Any], tiling: Tiling) -> None:
    with torch.cuda.device_of(next(x for x in given.values() if isinstance(x, Tensor))):
        kernel[grid](**given, num_warps=tiling.warps, num_stages=tiling.stages)


def sequences(
    x: Tensor, cu_seqlens: Tensor | None, chunk: int, rows_before: int = 0
) -> tuple[Sequences, int]:
    """The sequences in x [B, T, ...], and how many chunks they have.

    Of packed rows that number is an upper bound, which the host knows without asking the device.
    rows_before: what every sequence has in front of its tokens.
    """
    batch, length = x.shape[:2]
    offsets = None
    if cu_seqlens is not None:
        if cu_seqlens.device.type == "cpu":  # on a GPU they are trusted: to look would be to wait
            checks.bounds(cu_seqlens, batch, length)
        cu_seqlens = cu_seqlens.to(x.device, torch.int32, non_blocking=True)
        chunks = (cu_seqlens.diff() + rows_before + chunk - 1) // chunk
        offsets = F.pad(chunks, (1, 0)).cumsum(0)
        offsets = offsets.to(torch.int32)
    found = Sequences(cu_seqlens, offsets, checks.sequences(x, cu_seqlens), length)
    return found, count_chunks(x, cu_seqlens, chunk, rows_before)


def blocks(size: int, block: int) -> int:
    return -(-size // block)


def precision(*tensors: Tensor) -> str:
    """How products are computed, as tiles.dot() understands it.

    bf16: operands are rounded to bf16. The interpreter multiplies bf16 as bit patterns, so there
    the same rounding is done on float32 values ("bf16_emulated").
    fp16: intermediates would overflow, so they stay tf32, which has fp16's 10 bits of mantissa.
    fp32: three tf32 products, which keep about 21 bits.
    """
    dtype = common_dtype(*tensors)
    if dtype == torch.bfloat16:
        return "bf16_emulated" if interpreting() else "bf16"
    return "tf32" if dtype == torch.float16 else "tf32x3"


def common_dtype(*tensors: Tensor) -> torch.dtype:
    return reduce(torch.promote_types, (x.dtype for x in tensors))


def storage_dtype(*tensors: Tensor) -> torch.dtype:
    """dtype of a buffer between kernels for such tensors; float32 where bf16 is emulated."""
    dtype = common_dtype(*tensors)
    return torch.float32 if dtype == torch.bfloat16 and interpreting() else dtype


def operands(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors [..., D] in one dtype, with D a multiple of 16 and stride 1 along it.

    Odd widths in 16 bits break masked loads in some versions of Triton, and 128-bit loads in all.
    """
    dtype = storage_dtype(*tensors)
    return tuple(pad_width(x.to(dtype)) for x in tensors)


def pad_width(x: Tensor) -> Tensor:
    x = F.pad(x, (0, -x.shape[-1] % 16)) if x.shape[-1] % 16 else x
    return x if x.stride(-1) == 1 else x.contiguous()


def _target_of(device: torch.device) -> str:
    if device.type != "cuda":
        return "sm_80"
    properties = torch.cuda.get_device_properties(device)
    if getattr(properties, "shared_memory_per_block_optin", 0) < SMALL_SHARED_MEMORY:
        return "small"
    return {8: "sm_80", 9: "sm_90"}.get(properties.major, "sm_100")
