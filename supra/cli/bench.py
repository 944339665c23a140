"""`supra bench kernels | compile | parallel | decode | train | gpu`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from supra.cli.help import DEVELOP, Command, Group
from supra.cli.options import (
    DTYPES,
    GGUF_TYPES,
    Json,
    choice,
    file,
    flag,
    folder,
    integers,
    names,
    number,
    string,
    whole,
)
from supra.errors import UserError
from supra.uptrain import limits

SOLVER_DTYPES = ("float32", "float64")

Operations = Annotated[Sequence[str], names("--ops", "Operations. Default: all.")]
Batch = Annotated[int, whole("--batch", "Rows of a batch.", limits.COUNT)]
Repeats = Annotated[int, whole("--repeats", "Measurements of each.", limits.COUNT)]

app = typer.Typer(
    name="bench", cls=Group, rich_help_panel=DEVELOP, help="Measure kernels, solvers and models."
)


@app.command(
    cls=Command, epilog="supra bench kernels --ops linear_attention --lengths 2048,8192,32768"
)
def kernels(
    ops: Operations = (),
    lengths: Annotated[
        Sequence[int],
        integers(
            "--lengths",
            "Tokens. Several lengths show how time and memory grow; rivals then only decode.",
            limits.PASS,
        ),
    ] = (2048,),
    heads: Annotated[int, whole("--heads", "Heads.", limits.WIDTH)] = 8,
    head_size: Annotated[int, whole("--head-size", "Channels of a head.", limits.WIDTH)] = 64,
    dtype: Annotated[str, choice("--dtype", f"{', '.join(DTYPES)}.", DTYPES, "DTYPE")] = "float32",
    batch: Batch = 1,
    repeats: Repeats = 10,
    json: Json = False,
) -> None:
    """Measure how fast the operations are, and what one would use in their place."""
    from supra.bench.kernels import report
    from supra.checkpoint.opening import parse_dtype

    report(
        operations=ops,
        lengths=lengths,
        heads=heads,
        head_size=head_size,
        dtype=parse_dtype(dtype),
        batch=batch,
        repeats=repeats,
        as_json=json,
    )


@app.command(cls=Command, epilog="supra bench compile --archs sm_90 --check")
def compile(
    ops: Operations = (),
    case: Annotated[
        list[str] | None, string("--case", "Variant of an operation; repeatable.", "NAME")
    ] = None,
    archs: Annotated[
        Sequence[str], names("--archs", "Architectures: sm_80,sm_90,sm_100,small. Default: all.")
    ] = (),
    head_sizes: Annotated[
        Sequence[int],
        integers(
            "--head-sizes",
            "Channels of a head, e.g. 32,64. Default: depends on the kernel.",
            limits.WIDTH,
        ),
    ] = (),
    jobs: Annotated[int, whole("--jobs", "Processes that compile.", limits.BEAMS)] = 2,
    json: Json = False,
    check: Annotated[
        bool, flag("--check", "End with exit code 1 if a kernel breaks a gate.")
    ] = False,
    out: Annotated[
        Path | None, file("--out", "Write into this file and not to the terminal.")
    ] = None,
    roofline: Annotated[
        bool, flag("--roofline", "Show what an H100 allows, from bytes and products.")
    ] = False,
    against: Annotated[
        str | None,
        choice("--against", "Beside the kernels of another package: fla.", ("fla",), "PACKAGE"),
    ] = None,
    configurations: Annotated[
        int, whole("--configurations", "With --against, of each of its kernels.", limits.BEAMS)
    ] = 3,
) -> None:
    """Show registers, spills and memory traffic of the compiled kernels. It needs no GPU."""
    from supra.bench import against as beside
    from supra.bench import roofline as roof
    from supra.bench.compile import report

    shared = {
        "operations": ops,
        "widths": head_sizes,
        "processes": jobs,
        "as_json": json,
        "out": out,
    }
    if roofline:
        _alone("--roofline", {"--against": against, "--archs": archs, "--check": check})
        roof.report(cases=case, **shared)
    elif against:
        _alone("--against", {"--case": case})
        beside.report(against, targets=archs, configurations=configurations, check=check, **shared)
    else:
        report(cases=case, targets=archs, check=check, **shared)


def _alone(option: str, others: dict[str, Any]) -> None:
    """Raise UserError for another option that has a value and does not go with it."""
    for name, value in others.items():
        if value:
            raise UserError(f"{name} does not go with {option}: leave one of them out")


@app.command(cls=Command, epilog="supra bench parallel --lengths 256,2048,8192 --repeats 2")
def parallel(
    cells: Annotated[Sequence[str], names("--cells", "Recurrences to solve. Default: all.")] = (),
    methods: Annotated[Sequence[str], names("--methods", "Solvers. Default: all, and auto.")] = (),
    lengths: Annotated[Sequence[int], integers("--lengths", "Tokens.", limits.PASS)] = (
        256,
        2048,
        8192,
    ),
    widths: Annotated[Sequence[int], integers("--widths", "Channels of a cell.", limits.WIDTH)] = (
        16,
    ),
    batch: Batch = 1,
    dtype: Annotated[
        str, choice("--dtype", f"{' or '.join(SOLVER_DTYPES)}.", SOLVER_DTYPES, "DTYPE")
    ] = "float32",
    repeats: Repeats = 3,
    trust_region: Annotated[
        str, string("--trust-region", "Number λ of elk and quasi_elk, or auto.", "X")
    ] = "auto",
    json: Json = False,
) -> None:
    """Compare the solvers of nonlinear recurrences with a loop over the tokens."""
    from supra.bench.parallel import report

    report(
        cells=cells,
        methods=methods,
        lengths=lengths,
        widths=widths,
        batch=batch,
        dtype=dtype,
        repeats=repeats,
        trust_region=_number_or_text(trust_region),
        as_json=json,
    )


def _number_or_text(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


@app.command(cls=Command, epilog="supra bench decode --model ./rnn --teacher ./teacher")
def decode(
    model: Annotated[str, string("--model", "Converted model: hub id or folder.", "MODEL")],
    teacher: Annotated[str, string("--teacher", "Model that it was converted from.", "MODEL")],
    lengths: Annotated[Sequence[int], integers("--lengths", "Tokens of context.", limits.PASS)] = (
        2048,
        8192,
        32768,
    ),
    tokens: Annotated[int, whole("--tokens", "Tokens to decode at each length.", limits.PASS)] = 32,
    engines: Annotated[
        Sequence[str],
        names(
            "--engines",
            "Engines: transformers, compiled (a step of it by torch.compile), llama.cpp. "
            "Default: transformers,llama.cpp.",
        ),
    ] = (),
    type: Annotated[
        str,
        choice("--type", f"Of the GGUF files: {', '.join(GGUF_TYPES)}.", GGUF_TYPES, "TYPE"),
    ] = "q8_0",
    dtypes: Annotated[
        Sequence[str], names("--dtypes", f"In transformers: {', '.join(DTYPES)}.")
    ] = ("float32",),
    batches: Annotated[
        Sequence[int], integers("--batches", "Rows at once, in transformers.", limits.COUNT)
    ] = (1,),
    json: Json = False,
) -> None:
    """Compare how fast a converted model and its teacher decode, in several engines."""
    from supra.bench.decode import LLAMA_CPP, TRANSFORMERS, report

    report(
        model,
        teacher=teacher,
        lengths=lengths,
        tokens=tokens,
        engines=engines or (TRANSFORMERS, LLAMA_CPP),
        type=type,
        dtypes=dtypes,
        batches=batches,
        as_json=json,
    )


@app.command(
    cls=Command,
    epilog="supra bench train --model ./teacher --mixer mamba2 --variants plain,compile",
)
def train(
    model: Annotated[str, string("--model", "Transformer to convert: hub id or folder.", "MODEL")],
    mixer: Annotated[Sequence[str], names("--mixer", "Mixers of the students.")],
    stages: Annotated[
        Sequence[str], names("--stages", "Any of forward,align,distill,tune. Default: all.")
    ] = (),
    variants: Annotated[
        Sequence[str],
        names("--variants", "Any of plain,compile,checkpointing,unfused,fp32. Default: all."),
    ] = (),
    rows: Annotated[int, whole("--rows", "Rows of a step.", limits.COUNT)] = 2,
    length: Annotated[int, whole("--length", "Tokens of a row.", limits.PASS, 2)] = 512,
    steps: Annotated[
        int, whole("--steps", "Steps to measure, after three that do not count.", limits.COUNT)
    ] = 3,
    peak_tflops: Annotated[
        float | None,
        number("--peak-tflops", "Peak of the device, for MFU. Default: known for some GPUs."),
    ] = None,
    json: Json = False,
) -> None:
    """Measure training steps in each variant, and where their time goes."""
    from supra.bench.train.report import report

    report(
        model,
        mixers=mixer,
        stages=stages,
        variants=variants,
        rows=rows,
        length=length,
        steps=steps,
        peak_tflops=peak_tflops,
        as_json=json,
    )


@app.command(cls=Command, epilog="supra bench gpu --rivals ./wheels --minutes 9.5")
def gpu(
    groups: Annotated[
        Sequence[str],
        names("--groups", "Rows: checks,compile,operations,steps,training,decoding. Default: all."),
    ] = (),
    only: Annotated[
        str, string("--only", "Only rows whose name contains this, e.g. 'kda, forward'.")
    ] = "",
    rivals: Annotated[
        Path | None, folder("--rivals", "Folder with wheels of packages to compare with.")
    ] = None,
    run: Annotated[
        Path | None,
        folder("--folder", "Results, models and logs. Default: runs/gpu, or runs/gpu-rehearsal."),
    ] = None,
    out: Annotated[Path | None, file("--out", "The page. Default: gpu.md in the folder.")] = None,
    minutes: Annotated[
        float | None, number("--minutes", "Stop before so many minutes; the next call continues.")
    ] = None,
    limit: Annotated[
        float | None, number("--limit", "Seconds for one row. Default: 150, to rehearse 900.")
    ] = None,
    retry: Annotated[
        bool, flag("--retry", "Measure rows again that failed, or had no rival.")
    ] = False,
    rehearse: Annotated[
        bool, flag("--rehearse", "Run every row on the CPU, in Triton's interpreter.")
    ] = False,
) -> None:
    """Check and measure kernels, training and decoding on a GPU, and write a page."""
    from supra.bench.gpu.report import report

    report(
        groups=groups,
        only=only,
        rivals=rivals,
        folder=run,
        out=out,
        minutes=minutes,
        limit=limit,
        retry=retry,
        rehearse=rehearse,
    )
