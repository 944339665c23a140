"""`supra bench kernels | compile | parallel`: their arguments, and what runs."""

import argparse
from pathlib import Path
from typing import Any

from supra.cli.arguments import parse_integers, parse_names


def add_bench(commands: Any) -> None:
    add_bench_parallel(commands)
    add = commands.add_parser("kernels", help="speed of the operations, and of their rivals")
    add.add_argument("--ops", default="", metavar="A,B", help="operations; default: all")
    add.add_argument(
        "--lengths", default="2048", metavar="A,B",
        help="tokens; several show how time and memory grow, without rivals but in decoding",
    )  # fmt: skip
    add.add_argument("--heads", type=int, default=8)
    add.add_argument("--head-size", type=int, default=64)
    add.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16")
    add.add_argument("--batch", type=int, default=1)
    add.add_argument("--repeats", type=int, default=10, help="measurements of each")
    add.add_argument("--json", action="store_true", help="JSON")
    add.set_defaults(run=run_bench_kernels)

    add = commands.add_parser("compile", help="registers, spills and traffic; needs no GPU")
    add.add_argument("--ops", default="", metavar="A,B", help="operations; default: all")
    add.add_argument("--case", action="append", help="options of them; may be repeated")
    add.add_argument("--archs", default="", metavar="A,B", help="sm_80,sm_90,sm_100,small")
    add.add_argument("--head-sizes", default="", metavar="A,B", help="32,64,128,256")
    add.add_argument("--jobs", type=int, default=2, help="processes that compile")
    add.add_argument("--json", action="store_true", help="JSON")
    add.add_argument("--check", action="store_true", help="exit code 1 if a kernel breaks a gate")
    add.add_argument("--out", type=Path, metavar="FILE", help="write there and not to the terminal")
    add.set_defaults(run=run_bench_compile)


def add_bench_parallel(commands: Any) -> None:
    add = commands.add_parser("parallel", help="solvers of nonlinear recurrences against a loop")
    add.add_argument("--cells", default="", metavar="A,B", help="default: all")
    add.add_argument("--methods", default="", metavar="A,B", help="default: all, and auto")
    add.add_argument("--lengths", default="256,2048,8192", metavar="A,B", help="tokens")
    add.add_argument("--widths", default="16", metavar="A,B", help="channels of a cell")
    add.add_argument("--batch", type=int, default=1)
    add.add_argument("--dtype", default="float32", help="float32 or float64")
    add.add_argument("--repeats", type=int, default=3, help="measurements of each")
    add.add_argument("--json", action="store_true", help="JSON")
    add.set_defaults(run=run_bench_parallel)


def run_bench_kernels(arguments: argparse.Namespace) -> None:
    from supra.bench.kernels import report
    from supra.checkpoint.opening import parse_dtype

    report(
        operations=parse_names(arguments.ops),
        lengths=parse_integers("lengths", arguments.lengths),
        heads=arguments.heads,
        head_size=arguments.head_size,
        dtype=parse_dtype(arguments.dtype),
        batch=arguments.batch,
        repeats=arguments.repeats,
        as_json=arguments.json,
    )


def run_bench_compile(arguments: argparse.Namespace) -> None:
    from supra.bench.compile import report

    report(
        operations=parse_names(arguments.ops),
        cases=arguments.case,
        targets=parse_names(arguments.archs),
        widths=parse_integers("head-sizes", arguments.head_sizes),
        processes=arguments.jobs,
        as_json=arguments.json,
        check=arguments.check,
        out=arguments.out,
    )


def run_bench_parallel(arguments: argparse.Namespace) -> None:
    from supra.bench.parallel import report

    report(
        cells=parse_names(arguments.cells),
        methods=parse_names(arguments.methods),
        lengths=parse_integers("lengths", arguments.lengths),
        widths=parse_integers("widths", arguments.widths),
        batch=arguments.batch,
        dtype=arguments.dtype,
        repeats=arguments.repeats,
        as_json=arguments.json,
    )
