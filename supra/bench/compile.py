"""`supra bench compile`: a report on compiled kernels, which needs no GPU.

For every kernel it reports registers, spills, shared memory, tensor cores and the width of memory
accesses; for every operation, the bytes that it moves. `--check` fails if a row breaks a gate: no
stack, every product of tiles on tensor cores, at least 90 % of the bytes of a kernel with matrices
in accesses of 128 bits, and at most 64 KiB of shared memory for the target "small".
"""

import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from itertools import product
from pathlib import Path

from supra.bench import compiled, traffic
from supra.bench.compiled import Compiled, Job
from supra.bench.ir import LOOP_RUNS
from supra.bench.operations import OPERATIONS, head_sizes
from supra.bench.traffic import TOKENS, Traffic
from supra.bench.workers import run_parallel
from supra.checkpoint.json_files import to_json
from supra.errors import UserError, check_choice
from supra.kernels.launch import TARGETS

PARTS = ("forward", "backward", "recurrent")
PREFACE = f"""\
# Compiled kernels

Made by `supra bench compile{{options}} --out kernels/COMPILED.md` with Triton {{version}};
all inputs are bf16.

The columns of the kernels:

- stack: the bytes that a thread spills to memory.
- shared KiB: the shared memory of one block.
- blocks per SM: how many blocks a multiprocessor holds at once.
- dots: the products of tiles in the source.
- 128-bit bytes: the share of all bytes that move in accesses of 128 bits per thread. Every loop
  counts as {LOOP_RUNS} runs. Kernels that read and write no matrices have no share.
- narrow accesses: the number of instructions that move fewer than 128 bits per thread.

The traffic of an operation is in bytes per token and head, at {TOKENS} tokens:

- minimum: every input is read once, and every output is written once.
- requested: what the lanes of the kernels ask for.
- distinct: every sector of memory counts once per kernel.
- torch: what torch moves around the kernels.
- ratio: distinct and torch together, divided by the minimum.
"""

KERNEL_HEADER = (
    "kernel", "pass", "case", "head size", "target", "registers", "stack", "shared KiB",
    "blocks per SM", "dots", "tensor core instructions", "128-bit bytes", "narrow accesses",
    "gates",
)  # fmt: skip
TRAFFIC_HEADER = (
    "pass", "case", "head size", "targets", "minimum", "requested", "distinct", "torch", "ratio",
)  # fmt: skip


def report(
    *,
    operations: Sequence[str] | None = None,
    cases: Sequence[str] | None = None,
    targets: Sequence[str] | None = None,
    widths: Sequence[int] | None = None,
    processes: int = 2,
    as_json: bool = False,
    check: bool = False,
    out: Path | None = None,
) -> None:
    """Print the report, or write it to `out`; exit code 1 when `check` finds a broken gate."""
    given = {"--ops": operations, "--case": cases, "--archs": targets, "--head-sizes": widths}
    options = "".join(f" {name} {','.join(map(str, x))}" for name, x in given.items() if x)
    operations, targets = operations or list(OPERATIONS), targets or TARGETS
    check_names(operations, cases or (), targets, widths or (), processes)
    chosen = [
        (operation, case, width)
        for operation in operations
        for case, width in product(OPERATIONS[operation], widths or head_sizes(operation))
        if not cases or case in cases
    ]
    moved = measure_all([traffic.Job(*x, tuple(targets)) for x in chosen], processes)
    kernels = compile_all([Job(*x, target) for x in chosen for target in targets], processes)
    if as_json:
        rows = {
            "kernels": [asdict(x) | {"failures": x.failures()} for x in kernels],
            "traffic": [asdict(x) for x in moved],
        }
        text = to_json(rows, indent=1)
    else:
        text = "\n".join(lines(kernels, moved, options))
    if out:
        out.write_text(text + "\n")
    else:
        print(text)
    failures = [f"{describe(x)}: {failure}" for x in kernels for failure in x.failures()]
    if check and failures:
        print("\n".join(failures), file=sys.stderr)
        sys.exit(1)


def check_names(
    operations: Sequence[str],
    cases: Sequence[str],
    targets: Sequence[str],
    widths: Sequence[int],
    processes: int,
) -> None:
    """Raise UserError for an unknown name or a number out of range."""
    if find_spec("triton") is None:
        raise UserError("triton, which compiles the kernels, is not installed: pip install triton")
    if processes < 1:
        raise UserError(f"--jobs (={processes}) must be at least 1")
    for width in widths:
        if not 1 <= width <= 256:
            raise UserError(f"--head-sizes (={width}) must be from 1 to 256")
    known = {case for name in OPERATIONS for case in OPERATIONS[name]}
    for what, names, choices in (
        ("operation", operations, OPERATIONS),
        ("target", targets, TARGETS),
        ("case", cases, known),
    ):
        for name in names:
            check_choice(what, name, choices)


def compile_all(jobs: list[Job], processes: int) -> list[Compiled]:
    """Compile the jobs with an empty cache. Cases with the same compiled code are listed once."""
    with tempfile.TemporaryDirectory(prefix="supra-compile-") as cache:
        environment = {"TRITON_INTERPRET": None, "TRITON_CACHE_DIR": cache}
        results = run_parallel(compiled.compile_job, jobs, processes, environment, "compiling")
    rows = {}
    for row in (row for rows in results for row in rows):
        key = (row.job.operation, row.job.width, row.job.target, row.kernel)
        rows.setdefault((*key, row.code or row.error), row)
    return list(rows.values())


def measure_all(jobs: list[traffic.Job], processes: int) -> list[Traffic]:
    environment = {"TRITON_INTERPRET": "1"}
    results = run_parallel(traffic.measure, jobs, processes, environment, "counting bytes")
    return [row for rows in results for row in rows]


def describe(row: Compiled) -> str:
    job = row.job
    return (
        f"{job.operation} ({job.case}) {row.part} {row.kernel}, head size {job.width}, {job.target}"
    )


def lines(kernels: list[Compiled], moved: list[Traffic], options: str) -> list[str]:
    """The report in Markdown."""
    import triton

    found = PREFACE.format(options=options, version=triton.__version__).splitlines()
    for operation in dict.fromkeys(x.job.operation for x in kernels):
        ordered = sorted((x for x in kernels if x.job.operation == operation), key=_order)
        rows = [kernel_row(x) for x in ordered]
        found += ["", f"## {operation}", "", *table(KERNEL_HEADER, rows)]
        ordered = sorted(
            (x for x in moved if x.operation == operation), key=lambda x: PARTS.index(x.part)
        )
        found += ["", *table(TRAFFIC_HEADER, [traffic_row(x) for x in ordered])]
    return found


def kernel_row(row: Compiled) -> list[str]:
    job = row.job
    begin = [row.kernel, row.part, job.case, str(job.width), job.target]
    if row.error:
        return [*begin, *["—"] * (len(KERNEL_HEADER) - len(begin) - 1), row.error]
    return [
        *begin,
        str(row.registers),
        str(row.stack),
        f"{row.shared / 1024:.1f}",
        str(row.blocks),
        str(row.dots),
        ", ".join(f"{count} {kind}" for kind, count in sorted(row.tensor_core.items())) or "—",
        f"{row.wide:.0%}" if row.matrices else "—",
        str(row.narrow),
        "; ".join(row.failures()) or "ok",
    ]


def traffic_row(row: Traffic) -> list[str]:
    numbers = (row.minimum, row.requested, row.distinct, row.torch)
    return [
        row.part,
        row.case,
        str(row.width),
        "all" if len(row.targets) == len(TARGETS) else ", ".join(row.targets),
        *(f"{x:,.0f}" for x in numbers),
        f"{row.ratio:.2f}",
    ]


def table(header: Iterable[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table as lines, with aligned columns."""
    rows = [list(header), *rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    return [
        "| " + " | ".join(x.ljust(width) for x, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]


def _order(row: Compiled) -> tuple:
    """The order of rows: by pass and kernel, then by case, head size and target."""
    cases = list(OPERATIONS[row.job.operation])
    place = (PARTS.index(row.part), row.kernel, cases.index(row.job.case))
    return (*place, row.job.width, TARGETS.index(row.job.target))
