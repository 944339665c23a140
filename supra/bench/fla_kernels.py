"""Compiles the kernels of flash-linear-attention for a GPU that need not be present.

Its functions run on tensors without memory, forward and backward, and see a GPU of the target.
Every kernel that they launch is compiled and read instead. Its autotuner times configurations, and
takes the fastest. Without a GPU nobody knows which that is. So some of them are compiled, evenly
spread over its list, and the best is taken: one that fits on a multiprocessor, with the fewest
spilled bytes, and then the fewest registers.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch

from supra.bench.compiled import (
    BATCH,
    HEADS,
    PROCESSORS,
    TOKENS,
    AbsentGpu,
    Compiled,
    Job,
    examine,
)
from supra.bench.rivals import OPERATIONS, Setting

# name and number of multiprocessors of the GPUs that it is to see
GPUS = {
    "sm_80": ("NVIDIA A100", 108),
    "sm_90": ("NVIDIA H100", 132),
    "sm_100": ("NVIDIA B200", 148),
}
ALL = 10**6  # configurations


class Work(NamedTuple):
    """operation: as in supra.bench.rivals. configurations: to compile of each kernel."""

    operation: str
    width: int
    target: str
    configurations: int


@dataclass(frozen=True)
class Theirs:
    """The best of the configurations that were compiled of one launch, and the text of it."""

    row: Compiled
    configuration: str
    compiled: int
    listed: int


class _Launch(NamedTuple):
    kernel: Any
    arguments: tuple
    options: dict[str, Any]
    configuration: Any  # of the autotuner, or None
    listed: int


def compile_theirs(work: Work) -> list[Theirs]:
    """Every kernel that the operation launches. One process can see one target only, because
    flash-linear-attention looks at the GPU when it is imported."""
    setting = Setting(BATCH, TOKENS, HEADS, work.width, torch.bfloat16, "meta")
    job = Job(work.operation, "fla", work.width, work.target)
    with seen_as(work.target), recording(work.configurations) as (launches, compile):
        forward = _both_passes(work.operation, setting, launches)
        parts = ["forward"] * forward + ["backward"] * (len(launches) - forward)
        pairs = zip(parts, launches, strict=True)
        return [best(job, part, group, compile) for part, group in pairs]


def _both_passes(operation: str, setting: Setting, launches: list) -> int:
    """Run both on tensors without memory; the number of launches of the forward pass."""
    entry = OPERATIONS[operation]
    inputs = {name: x.requires_grad_() for name, x in entry.inputs(setting).items()}
    output = entry.rivals["fla"].whole(**inputs)
    forward = len(launches)
    torch.autograd.grad(output, list(inputs.values()), torch.ones_like(output), allow_unused=True)
    return forward


def fill_cache(operation: str, setting: Setting, target: str, part: int, parts: int) -> int:
    """Compile every `parts`-th configuration of all kernels into Triton's cache, so that the
    autotuner only has to time them. The number of those that compiled."""
    done = 0
    with seen_as(target), recording(ALL) as (launches, compile):
        _both_passes(operation, setting._replace(device="meta"), launches)
        entries = [entry for group in launches for entry in group]
        for entry in entries[part::parts]:
            with suppress(Exception):  # one that does not compile is left out by the autotuner too
                compile(entry)
                done += 1
    return done


Recorded = tuple[list[list[_Launch]], Callable[[_Launch], Any]]


def best(job: Job, part: str, group: list[_Launch], compile: Callable[[_Launch], Any]) -> Theirs:
    """The best of the configurations of one launch."""
    found = [(_compiled(job, part, x, compile), x) for x in group]
    row, launch = min(found, key=lambda x: _order(x[0]))
    return Theirs(row, str(launch.configuration or "fixed"), len(group), launch.listed)


def _compiled(job: Job, part: str, launch: _Launch, compile: Callable[[_Launch], Any]) -> Compiled:
    try:
        return examine(job, part, compile(launch))
    except Exception as error:  # the compiler raises many kinds; one must not hide the others
        lines = str(error).splitlines() or [""]
        name = launch.kernel.__name__
        return Compiled(job, part, name, error=f"{type(error).__name__}: {lines[-1]}")


def _order(row: Compiled) -> tuple:
    return bool(row.error), row.blocks == 0, row.stack, row.registers


@contextmanager
def recording(configurations: int) -> Iterator[Recorded]:
    """Inside, kernels are listed instead of launched: a list for each launch, with an entry for
    each of so many configurations. Also yields the function that compiles an entry."""
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    launches: list[list[_Launch]] = []
    tuned: list[tuple[Any, int]] = []  # the configuration of the launch, and how many there are
    original = JITFunction.run

    def run(kernel, *arguments, grid, warmup=False, **options):
        if not tuned:
            launches.append([])
        launches[-1].append(_Launch(kernel, arguments, options, *(tuned or [(None, 1)])[-1]))

    def tune(tuner, *arguments, **options):
        tuner.nargs = dict(zip(tuner.arg_names, arguments, strict=False))
        listed = tuner.prune_configs(options)
        launches.append([])
        for configuration in spread(listed, configurations):
            tuned.append((configuration, len(listed)))
            tuner.fn.run(*arguments, **options, **configuration.all_kwargs())
            tuned.pop()

    def compile(entry: _Launch) -> Any:
        return original(entry.kernel, *entry.arguments, grid=(1,), warmup=True, **entry.options)

    with mock.patch.object(JITFunction, "run", run), mock.patch.object(Autotuner, "run", tune):
        yield launches, compile


def spread(items: list[Any], count: int) -> list[Any]:
    """So many items, evenly spread from the first to the last; all if there are no more."""
    if len(items) <= count:
        return list(items)
    if count == 1:
        return items[:1]
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


@contextmanager
def seen_as(target: str) -> Iterator[None]:
    """Inside, Triton and torch report a GPU of that target."""
    from triton.runtime.driver import driver

    processor, (name, count) = PROCESSORS[target], GPUS[target]
    capability = divmod(processor.architecture, 10)
    properties = SimpleNamespace(
        name=name, major=capability[0], minor=capability[1], multi_processor_count=count,
        shared_memory_per_block=48 * 1024, shared_memory_per_block_optin=processor.block_shared,
    )  # fmt: skip
    reported = {
        "get_device_name": name, "get_device_capability": capability, "current_device": 0,
        "get_device_properties": properties, "device_count": 1,
    }  # fmt: skip
    driver.set_active(AbsentGpu(processor, count))
    with ExitStack() as patches:
        for function, value in reported.items():
            patch = mock.patch.object(torch.cuda, function, lambda *_, value=value: value)
            patches.enter_context(patch)
        yield
