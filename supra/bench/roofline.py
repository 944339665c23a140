"""`supra bench compile --roofline`: what an operation should take on an H100.

A pass cannot be faster than its memory or its products allow: bytes over the bandwidth, and FLOPs
over the peak of the tensor cores. Both are counted in Triton's interpreter (supra.bench.traffic).
"""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path

from supra.bench import traffic
from supra.bench.compile import check_names, measure_all, table
from supra.bench.operations import OPERATIONS, head_sizes
from supra.bench.traffic import Traffic
from supra.checkpoint.json_files import to_json

TARGET = "sm_90"
BANDWIDTH, PEAK = 3.35e12, 989e12  # of an H100 SXM: bytes and FLOPs in bfloat16 a second
TOKENS, HEADS = 32_768, 16  # as in `supra bench gpu`
PARTS = ("forward", "backward")
PREFACE = f"""\
# What an H100 allows

Made by `supra bench compile --roofline{{options}}`. Times are in microseconds for {TOKENS:,} tokens
and {HEADS} heads in bf16, at {BANDWIDTH / 1e12:.2f} TB/s and {PEAK / 1e12:.0f} TFLOPs.

- minimum: every input is read once, and every output is written once.
- moved: what the kernels, and torch around them, read and write.
- products: of tiles on the tensor cores, 2 FLOPs for each multiplication.
- FLOPs per byte: of the bytes that move. From {PEAK / BANDWIDTH:.0f} on, products are the bound.
- should take: the longer of moved and products, without launches, waiting and vector arithmetic.
"""
HEADER = (
    "operation", "pass", "case", "head size", "minimum µs", "moved µs", "products µs",
    "FLOPs per byte", "should take µs", "bound by",
)  # fmt: skip


def report(
    *,
    operations: Sequence[str] | None = None,
    cases: Sequence[str] | None = None,
    widths: Sequence[int] | None = None,
    processes: int = 2,
    as_json: bool = False,
    out: Path | None = None,
) -> None:
    """Print the table, or write it to `out`. Raises UserError for an unknown name."""
    given = {"--ops": operations, "--case": cases, "--head-sizes": widths}
    options = "".join(f" {name} {','.join(map(str, x))}" for name, x in given.items() if x)
    operations = operations or list(OPERATIONS)
    check_names(operations, cases or (), (TARGET,), widths or (), processes)
    jobs = [
        traffic.Job(operation, case, width, (TARGET,))
        for operation in operations
        for case, width in product(OPERATIONS[operation], widths or head_sizes(operation))
        if not cases or case in cases
    ]
    rows = [x for x in measure_all(jobs, processes) if x.part in PARTS]
    if as_json:
        text = to_json([asdict(x) | {"microseconds": microseconds(x)} for x in rows], indent=1)
    else:
        header = PREFACE.format(options=options).splitlines()
        text = "\n".join([*header, "", *table(HEADER, [cells(x) for x in rows])])
    if out:
        out.write_text(text + "\n")
    else:
        print(text)


def microseconds(row: Traffic) -> dict[str, float]:
    """The least time of each resource."""
    scale = 1e6 * TOKENS * HEADS
    return {
        "minimum": scale * row.minimum / BANDWIDTH,
        "moved": scale * row.moved / BANDWIDTH,
        "products": scale * row.products / PEAK,
    }


def cells(row: Traffic) -> list[str]:
    times = microseconds(row)
    bound = max(("moved", "products"), key=times.get)
    return [
        row.operation, row.part, row.case, str(row.width),
        *(f"{x:,.0f}" for x in times.values()),
        f"{row.products / row.moved:.0f}",
        f"{times[bound]:,.0f}",
        "memory" if bound == "moved" else "products",
    ]  # fmt: skip
