"""Counts the bytes that an operation moves, compared with the minimum.

Triton's interpreter runs the kernels with the tilings of their target, and every active lane is
counted. `requested` is the sum. `distinct` counts each sector of 32 bytes once per kernel for loads
and once for stores, as if caches held everything that a kernel touches. The traffic of GPU memory
lies between the two. The operators of torch around the kernels count all tensors that they read or
write. `minimum` is: every input read once, and every output written once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from supra.bench.operations import OPERATIONS, Call, run_calls
from supra.kernels import launch

TOKENS, HEADS = 512, 1
SECTOR = 32  # bytes; GPU memory is read and written in these units


class Job(NamedTuple):
    operation: str
    case: str
    width: int
    targets: tuple[str, ...]


@dataclass
class Traffic:
    """Bytes per token and head of one call; the tilings are the same on all `targets`.

    minimum, requested, distinct: those at the top of this file. torch: of its operators around the
    kernels. products: FLOPs of products of tiles, not bytes.
    """

    operation: str
    case: str
    width: int
    part: str
    minimum: float
    torch: float = 0.0
    requested: float = 0.0
    distinct: float = 0.0
    products: float = 0.0
    targets: list[str] = field(default_factory=list)

    @property
    def moved(self) -> float:
        return self.distinct + self.torch

    @property
    def ratio(self) -> float:
        return self.moved / self.minimum


def measure(job: Job) -> list[Traffic]:
    """Traffic of every call of one case. Triton must be interpreting."""
    case = OPERATIONS[job.operation][job.case]
    found: dict[tuple, Traffic] = {}

    def run(call: Call) -> Any:
        with launch.recording() as launches, _TorchBytes() as around:
            result = call()
        key = (call.part, str([(x.kernel.__name__, x.grid, x.constants) for x in launches]))
        if key not in found:
            rows = HEADS * (1 if call.part == "recurrent" else TOKENS)
            minimum = _bytes((call.arguments, result, call.changed)) / rows
            traffic = Traffic(*job[:3], call.part, minimum, around.total / rows)
            for kernel, grid, arguments, constants, cut in launches:
                with counting() as counted:
                    launch.launch(kernel, grid, arguments, cut, **constants)
                traffic.requested += counted.requested / rows
                traffic.distinct += counted.distinct() / rows
                traffic.products += counted.products / rows
            found[key] = traffic
        found[key].targets.append(target)
        return result

    # The interpreter computes wrong numbers for bf16, but no address depends on them.
    with mock.patch.object(launch, "interpreting", lambda: False):
        for target in job.targets:
            with launch.target(target):
                run_calls(case.with_sizes(1, TOKENS, HEADS, job.width, "cpu"), run)
    return list(found.values())


class Counted:
    """The loads and stores of one kernel, and the FLOPs of its products of tiles."""

    def __init__(self):
        self.requested = self.products = 0
        self.loaded: list[np.ndarray] = []
        self.stored: list[np.ndarray] = []

    def add(self, pointers, mask, sectors: list[np.ndarray]) -> None:
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        size = pointers.get_element_ty().primitive_bitwidth // 8
        self.requested += addresses.size * size
        sectors.append(np.unique(addresses // SECTOR))

    def distinct(self) -> int:
        ways = [np.concatenate(x) for x in (self.loaded, self.stored) if x]
        return SECTOR * sum(np.unique(sectors).size for sectors in ways)


@contextmanager
def counting() -> Iterator[Counted]:
    """Inside, count what the interpreter loads, stores and multiplies."""
    from triton.runtime.interpreter import ScanOps
    from triton.runtime.interpreter import interpreter_builder as builder

    counted = Counted()
    load, store = builder.create_masked_load, builder.create_masked_store
    dot = builder.create_dot

    def counted_load(pointers, mask, *rest):
        counted.add(pointers, mask, counted.loaded)
        return load(pointers, mask, *rest)

    def counted_store(pointers, value, mask, *rest):
        counted.add(pointers, mask, counted.stored)
        return store(pointers, value, mask, *rest)

    def counted_dot(x, y, *rest):
        counted.products += 2 * x.data.size * y.data.shape[-1]
        return dot(x, y, *rest)

    with (
        np.errstate(all="ignore"),
        mock.patch.object(builder, "create_dot", counted_dot),
        mock.patch.object(builder, "create_masked_load", counted_load),
        mock.patch.object(builder, "create_masked_store", counted_store),
        mock.patch.object(ScanOps, "generic_scan", lambda _, input: list(input)),  # slow
        mock.patch.object(builder, "get_bf16", builder.get_fp16, create=True),  # it has none
    ):
        yield counted


class _TorchBytes(TorchDispatchMode):
    """Counts the tensors that torch's operators read and write; views and empty ones are free."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        view = any(x.alias_info and not x.alias_info.is_write for x in func._schema.returns)
        if not view and "empty" not in func._schema.name:
            self.total += _bytes((args, kwargs, result))
        return result


def _bytes(tree: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tree_leaves(tree) if isinstance(x, Tensor))
