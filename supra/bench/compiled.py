"""Compiles kernels for a GPU that need not be present, and reads their machine code.

Every kernel that an operation launches is compiled with the types and alignments of its arguments.
"""

import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from supra.bench import ir, sass
from supra.bench.operations import OPERATIONS, Case, run_calls
from supra.kernels import launch

# Except the width, no size is a multiple of 16, so that no stride is aligned by chance.
BATCH, TOKENS, HEADS = 2, 1000, 4
SMALL_SHARED = 64 * 1024
MIN_WIDE = 0.9


class Processor(NamedTuple):
    """The resources of one multiprocessor (CUDA C++ Programming Guide, table 30)."""

    architecture: int
    shared: int  # bytes
    threads: int
    blocks: int
    registers: int = 65536
    tensor_memory: int = 512  # columns

    @property
    def block_shared(self) -> int:
        """Bytes of shared memory that one block can have: 1 KiB is for the system."""
        return self.shared - 1024


PROCESSORS = {
    "sm_80": Processor(80, 164 * 1024, 2048, 32),
    "sm_90": Processor(90, 228 * 1024, 2048, 32),
    "sm_100": Processor(100, 228 * 1024, 2048, 32),
    "small": Processor(80, 100 * 1024, 1536, 16),  # code for sm_80, run on sm_86
}


@dataclass(frozen=True)
class Job:
    operation: str
    case: str
    width: int
    target: str


@dataclass(frozen=True)
class Compiled:
    """One kernel, as one launch compiles it."""

    job: Job
    part: str
    kernel: str
    registers: int = 0  # per thread
    stack: int = 0  # bytes per thread; these were spilled
    shared: int = 0  # bytes per block
    warps: int = 0  # per block
    blocks: int = 0  # that fit on one multiprocessor
    dots: int = 0  # products of tiles in the source
    scalar_dots: int = 0  # products of tiles that are computed without tensor cores
    tensor_core: dict[str, int] = field(default_factory=dict)  # instructions by kind
    matrices: bool = True  # whether it loads or stores matrices; pairs of numbers do not count
    wide: float = 1.0  # share of the bytes in accesses of 128 bits per thread, see ir.wide_share
    narrow: int = 0  # number of instructions with narrower accesses
    code: str = ""  # a hash, equal for launches that compile to the same code
    error: str = ""

    def failures(self) -> list[str]:
        """The gates it breaks."""
        if self.error:
            return [self.error]
        found = []
        if self.stack:
            found.append(f"spills {self.stack} B of stack")
        if self.scalar_dots or (self.dots and not self.tensor_core):
            found.append(f"{self.scalar_dots or self.dots} dots without tensor cores")
        if self.matrices and self.wide < MIN_WIDE:
            found.append(f"{self.wide:.0%} of bytes in 128 bits, less than {MIN_WIDE:.0%}")
        if self.blocks == 0:
            found.append("one block does not fit on a multiprocessor")
        if self.job.target == "small" and self.shared > SMALL_SHARED:
            found.append(f"{self.shared} B of shared memory, more than {SMALL_SHARED}")
        return found


def compile_job(job: Job) -> list[Compiled]:
    """Compile all kernels that one case launches. Triton must be installed and not interpreting."""
    return compile_case(job, OPERATIONS[job.operation][job.case])


def compile_case(job: Job, case: Case) -> list[Compiled]:
    found = []

    def run(call):
        with launch.recording() as launches:
            result = call()
        found.extend(compile_launch(job, call.part, x) for x in launches)
        return result

    with launch.target(job.target):
        run_calls(case.with_sizes(BATCH, TOKENS, HEADS, job.width, "meta"), run)
    return found


def compile_launch(job: Job, part: str, launched: launch.Launch) -> Compiled:
    from triton.runtime.driver import driver

    name = launched.kernel.__name__
    driver.set_active(AbsentGpu(PROCESSORS[job.target]))
    try:
        compiled = launched.kernel.warmup(
            **launched.arguments,
            **launched.constants,
            num_warps=launched.tiling.warps,
            num_stages=launched.tiling.stages,
            grid=launched.grid,
        )
    except Exception as error:  # the compiler raises many kinds; one must not hide the other rows
        reason = str(error).splitlines() or [""]
        return Compiled(job, part, name, error=f"{type(error).__name__}: {reason[-1]}")
    return examine(job, part, compiled)


class AbsentGpu:
    """A device that Triton's JIT compiles for, as if it were to launch; it cannot run anything."""

    def __init__(self, processor: Processor, multiprocessors: int = 1):
        self.architecture = processor.architecture
        shared, count = processor.block_shared, multiprocessors
        properties = {"max_shared_mem": shared, "multiprocessor_count": count}
        self.utils = SimpleNamespace(get_device_properties=lambda _: properties)

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture  # the JIT has one cache per device

    def get_current_stream(self, device: int) -> int:
        return 0


def examine(job: Job, part: str, compiled: Any) -> Compiled:
    """Read the compiled code of a kernel."""
    metadata = compiled.metadata
    registers, stack = sass.parse_usage(disassemble(compiled, "cuobjdump", "-res-usage"))
    instructions = list(sass.parse_instructions(disassemble(compiled, "nvdisasm", "-g", "-c")))
    ttir = compiled.asm["ttir"]
    accesses = ir.accesses(ttir)
    return Compiled(
        job,
        part,
        metadata.name,
        registers=registers,
        stack=stack,
        shared=metadata.shared,
        warps=metadata.num_warps,
        blocks=resident_blocks(
            PROCESSORS[job.target],
            registers,
            metadata.shared,
            metadata.num_warps,
            getattr(metadata, "tmem_size", None) or 0,
        ),
        dots=ir.count_dots(ttir),
        scalar_dots=ir.count_scalar_dots(compiled.asm["ttgir"]),
        tensor_core=dict(sass.tensor_core_instructions(instructions)),
        matrices=any(len(x.shape) > 1 and min(x.shape) > 2 for x in accesses),
        wide=ir.wide_share(accesses, sass.wide_shares(instructions)),
        narrow=sass.narrow_accesses(instructions),
        code=compiled.hash,
    )


def disassemble(compiled: Any, tool: str, *options: str) -> str:
    """The output of one of CUDA's tools, which come with Triton, for the machine code."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        command = [getattr(knobs.nvidia, tool).path, *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resident_blocks(
    processor: Processor, registers: int, shared: int, warps: int, tensor_memory: int = 0
) -> int:
    """The number of blocks that fit on one multiprocessor.

    Warps get registers in units of 256, four warps at a time. Shared memory is allocated in units
    of 128 bytes, with another 1 KiB per block for the system.
    """
    by_warp = -(-registers * 32 // 256) * 256
    rooms = [
        processor.blocks,
        processor.threads // (32 * warps),
        processor.registers // by_warp // 4 * 4 // warps,
        processor.shared // (-(-shared // 128) * 128 + 1024),
    ]
    if tensor_memory:
        rooms.append(processor.tensor_memory // tensor_memory)
    return min(rooms)
