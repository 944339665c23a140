"""Kernels as they are compiled for a GPU that need not be there.

Every kernel that an operation launches is compiled with the types and alignments of the arguments
that it was launched with, and its machine code is read.
"""

import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from supra.bench import ir, sass
from supra.bench.operations import OPERATIONS, run_calls
from supra.kernels import launch

# No size but the width is a multiple of 16, so that no stride is aligned by chance.
BATCH, TOKENS, HEADS = 2, 1000, 4
SMALL_SHARED = 64 * 1024
LEAST_WIDE = 0.9


class Processor(NamedTuple):
    """What one multiprocessor has for the blocks it runs (CUDA C++ Programming Guide, table 30)."""

    architecture: int
    shared: int  # bytes
    threads: int
    blocks: int
    registers: int = 65536
    tensor_memory: int = 512  # columns


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
    """One kernel as one launch compiles it."""

    job: Job
    part: str
    kernel: str
    registers: int = 0  # of a thread
    stack: int = 0  # bytes of a thread; what is there was spilled
    shared: int = 0  # bytes of a block
    warps: int = 0  # of a block
    blocks: int = 0  # that one multiprocessor has room for
    dots: int = 0  # products of tiles in the source
    scalar_dots: int = 0  # of these, those that are computed without tensor cores
    tensor_core: dict[str, int] = field(default_factory=dict)  # instructions by kind
    matrices: bool = True  # whether it loads or stores any; pairs of numbers are none
    wide: float = 1.0  # share of the bytes that move 128 bits a thread, see ir.wide_share
    narrow: int = 0  # instructions that move fewer
    code: str = ""  # equal for launches that compile to the same
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
        if self.matrices and self.wide < LEAST_WIDE:
            found.append(f"{self.wide:.0%} of bytes in 128 bits, less than {LEAST_WIDE:.0%}")
        if self.blocks == 0:
            found.append("one block is more than a multiprocessor has room for")
        if self.job.target == "small" and self.shared > SMALL_SHARED:
            found.append(f"{self.shared} B of shared memory, more than {SMALL_SHARED}")
        return found


def compile_job(job: Job) -> list[Compiled]:
    """Compile all that one case launches. Triton must be importable and not interpreting."""
    case = OPERATIONS[job.operation][job.case]
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
    driver.set_active(_Absent(PROCESSORS[job.target].architecture))
    try:
        compiled = launched.kernel.warmup(
            **launched.arguments,
            **launched.constants,
            num_warps=launched.tiling.warps,
            num_stages=launched.tiling.stages,
            grid=launched.grid,
        )
    except Exception as error:  # the compiler's own, of many kinds; one must not hide the rest
        reason = str(error).splitlines() or [""]
        return Compiled(job, part, name, error=f"{type(error).__name__}: {reason[-1]}")
    return examine(job, part, compiled)


class _Absent:
    """A device for Triton's JIT to compile for, as if a launch were due; it cannot run anything."""

    def __init__(self, architecture: int):
        self.architecture = architecture

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture  # the JIT keeps one cache a device

    def get_current_stream(self, device: int) -> int:
        return 0


def examine(job: Job, part: str, compiled: Any) -> Compiled:
    """Read what Triton compiled."""
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
    """What one of CUDA's tools, which come with Triton, prints about the machine code."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        command = [getattr(knobs.nvidia, tool).path, *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resident_blocks(
    processor: Processor, registers: int, shared: int, warps: int, tensor_memory: int = 0
) -> int:
    """Blocks that fit on one multiprocessor.

    A warp gets registers in units of 256, four warps at a time; a block's shared memory comes in
    units of 128 bytes with 1 KiB on top for the system.
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
