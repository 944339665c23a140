"""`supra bench compile --against fla`: the kernels of flash-linear-attention beside supra's.

Both are compiled in the same run, for the same shapes and without a GPU, and read in the same way.
"""

import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import NamedTuple

from supra.bench.compile import describe, table
from supra.bench.compiled import BATCH, HEADS, TOKENS, Compiled, Job, compile_case
from supra.bench.fla_kernels import GPUS, Theirs, Work, compile_theirs
from supra.bench.operations import OPERATIONS, Case, linear_attention
from supra.bench.workers import run_parallel
from supra.checkpoint.json_files import to_json
from supra.errors import UserError, check_choice

RIVALS = ("fla",)
WIDTHS = (64, 128)
PARTS = ("forward", "backward")
CONFIGURATIONS = 3


class Pair(NamedTuple):
    """supra's case, and the operation in supra.bench.rivals whose rival computes the same."""

    ours: Case
    theirs: str


PAIRS = {
    "linear_attention": Pair(Case(partial(linear_attention, decay=True)), "mamba2"),
    "gated_linear_attention": Pair(
        OPERATIONS["gated_linear_attention"]["plain"], "gated_linear_attention"
    ),
    "gated_delta_rule": Pair(OPERATIONS["gated_delta_rule"]["decay"], "gated_delta_rule"),
    "kda": Pair(OPERATIONS["kda"]["plain"], "kda"),
}
PREFACE = f"""\
# Compiled kernels beside flash-linear-attention's

Made by `supra bench compile --against fla{{options}}` with Triton {{triton}} and
flash-linear-attention {{fla}}. All inputs are bf16: {BATCH} rows of {TOKENS} tokens, {HEADS} heads.
`linear_attention` has a decay per token and head, as `simple_gla` has.

Cells are "supra / flash-linear-attention", over all kernels of a pass:

- registers, stack, shared KiB: the largest of a kernel. stack is in bytes that a thread spills.
- blocks per SM: the smallest number of blocks of a kernel that a multiprocessor holds at once.
- tensor core instructions, narrow accesses: of all kernels together.
- 128-bit bytes: the smallest share of a kernel that reads or writes matrices.

flash-linear-attention times configurations of its kernels and takes the fastest. Here {{count}} of
each kernel, evenly spread over its list, are compiled, and the row has the best: the fewest spilled
bytes, then the fewest registers. So it is not always the configuration that runs on a GPU.
"""
HEADER = (
    "pass", "head size", "target", "kernels", "registers", "stack", "shared KiB", "blocks per SM",
    "tensor core instructions", "128-bit bytes", "narrow accesses",
)  # fmt: skip
KERNEL_HEADER = (
    "by", "pass", "head size", "target", "kernel", "registers", "stack", "shared KiB",
    "blocks per SM", "tensor core instructions", "128-bit bytes", "narrow accesses",
    "configuration",
)  # fmt: skip


@dataclass(frozen=True)
class Both:
    """The kernels of one pass: supra's, and those of flash-linear-attention."""

    operation: str
    part: str
    width: int
    target: str
    ours: list[Compiled]
    theirs: list[Theirs]

    def failure(self) -> str | None:
        """supra spills where the other does not."""
        ours = sum(x.stack for x in self.ours)
        if ours and not any(x.row.stack for x in self.theirs):
            return f"{describe(next(x for x in self.ours if x.stack))}: spills, and theirs does not"
        return None


def report(
    rival: str,
    *,
    operations: Sequence[str] | None = None,
    targets: Sequence[str] | None = None,
    widths: Sequence[int] | None = None,
    configurations: int = CONFIGURATIONS,
    processes: int = 2,
    as_json: bool = False,
    check: bool = False,
    out: Path | None = None,
) -> None:
    """Print the report, or write it to `out`; exit code 1 when `check` finds that supra spills and
    the other does not."""
    given = {"--ops": operations, "--archs": targets, "--head-sizes": widths}
    options = "".join(f" {name} {','.join(map(str, x))}" for name, x in given.items() if x)
    operations, targets = operations or list(PAIRS), targets or list(GPUS)
    _check(rival, operations, targets, widths or (), processes)
    rows = _measure(list(product(operations, widths or WIDTHS, targets)), configurations, processes)
    if as_json:
        text = to_json([asdict(row) for row in rows], indent=1)
    else:
        text = "\n".join(lines(rows, options, configurations))
    if out:
        out.write_text(text + "\n")
    else:
        print(text)
    failures = [x for row in rows if (x := row.failure())]
    if check and failures:
        print("\n".join(failures), file=sys.stderr)
        sys.exit(1)


def _check(
    rival: str,
    operations: Sequence[str],
    targets: Sequence[str],
    widths: Sequence[int],
    processes: int,
) -> None:
    """Raise UserError for an unknown name, a number out of range, or a missing package."""
    check_choice("rival", rival, RIVALS)
    for what, names, choices in (("operation", operations, PAIRS), ("target", targets, GPUS)):
        for name in names:
            check_choice(what, name, choices)
    for width in widths:
        if not 16 <= width <= 256:
            raise UserError(f"--head-sizes (={width}) must be from 16 to 256 with --against")
    if processes < 1:
        raise UserError(f"--jobs (={processes}) must be at least 1")
    for package in ("triton", "fla", "einops"):
        if find_spec(package) is None:
            raise UserError(
                f"{package} is not installed: pip install triton einops, and "
                "pip install --no-deps flash-linear-attention fla-core"
            )


Shape = tuple[str, int, str]  # operation, head size, target


def _measure(shapes: list[Shape], configurations: int, processes: int) -> list[Both]:
    ours = dict(zip(shapes, _compile(_compile_ours, shapes, processes), strict=True))
    theirs: dict[Shape, list[Theirs]] = {}
    for target in dict.fromkeys(target for *_, target in shapes):
        same = [x for x in shapes if x[2] == target]  # a process sees one kind of GPU only
        works = [Work(PAIRS[name].theirs, *rest, configurations) for name, *rest in same]
        theirs |= zip(same, _compile(compile_theirs, works, processes), strict=True)
    return [
        Both(
            name, part, width, target,
            [x for x in ours[name, width, target] if x.part == part],
            [x for x in theirs[name, width, target] if x.row.part == part],
        )
        for name, width, target in shapes
        for part in PARTS
    ]  # fmt: skip


def _compile(function: Callable, items: list, processes: int) -> list:
    with tempfile.TemporaryDirectory(prefix="supra-compile-") as cache:
        environment = {"TRITON_INTERPRET": None, "TRITON_CACHE_DIR": cache}
        return run_parallel(function, items, processes, environment, "compiling")


def _compile_ours(shape: Shape) -> list[Compiled]:
    operation, width, target = shape
    job = Job(operation, "beside flash-linear-attention", width, target)
    rows = compile_case(job, PAIRS[operation].ours)
    return [x for x in rows if x.part in PARTS]


def lines(rows: Sequence[Both], options: str, configurations: int) -> list[str]:
    """The report in Markdown."""
    versions = {"triton": version("triton"), "fla": version("fla-core")}
    found = PREFACE.format(options=options, count=configurations, **versions).splitlines()
    for operation in dict.fromkeys(x.operation for x in rows):
        own = [x for x in rows if x.operation == operation]
        found += ["", f"## {operation}", "", *table(HEADER, [_cells(x) for x in own])]
        found += ["", *table(KERNEL_HEADER, [x for row in own for x in _kernels(row)])]
    return found


def _cells(row: Both) -> list[str]:
    sides = [_sums(row.ours), _sums([x.row for x in row.theirs])]
    pairs = [" / ".join(cells) for cells in zip(*sides, strict=True)]
    return [row.part, str(row.width), row.target, *pairs]


def _sums(rows: Sequence[Compiled]) -> list[str]:
    """Over the kernels of a pass; those that did not compile are left out of all but the first."""
    done = [x for x in rows if not x.error]
    if not done:
        return [str(len(rows))] + ["—"] * 7
    return [
        str(len(rows)),
        str(max(x.registers for x in done)),
        str(max(x.stack for x in done)),
        f"{max(x.shared for x in done) / 1024:.1f}",
        str(min(x.blocks for x in done)),
        str(sum(sum(x.tensor_core.values()) for x in done)),
        f"{min((x.wide for x in done if x.matrices), default=1.0):.0%}",
        str(sum(x.narrow for x in done)),
    ]


def _kernels(row: Both) -> Iterable[list[str]]:
    """A line for each kernel of both."""
    for x in row.ours:
        yield ["supra", *_kernel(row, x), "fixed"]
    for x in row.theirs:
        compiled = f"{x.configuration} (best of {x.compiled} of {x.listed})"
        yield ["fla", *_kernel(row, x.row), compiled if x.listed > 1 else "fixed"]


def _kernel(row: Both, x: Compiled) -> list[str]:
    begin = [row.part, str(row.width), row.target, x.kernel]
    if x.error:
        return [*begin, x.error, *["—"] * 6]
    core = ", ".join(f"{count} {kind}" for kind, count in sorted(x.tensor_core.items()))
    return [
        *begin,
        str(x.registers),
        str(x.stack),
        f"{x.shared / 1024:.1f}",
        str(x.blocks),
        core or "—",
        f"{x.wide:.0%}" if x.matrices else "—",
        str(x.narrow),
    ]
