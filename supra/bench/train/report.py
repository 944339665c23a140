"""Measures training stages in each variant, and prints a row as soon as it is done.

Every row runs in a process of its own, so that its peak of memory is its own.
"""

import math
import multiprocessing
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from supra.bench.timing import processor
from supra.bench.train.measure import FORWARD, measure
from supra.bench.train.text import write_text
from supra.checkpoint.json_files import to_json
from supra.checkpoint.opening import find_checkpoint
from supra.conversion.convert import convert
from supra.errors import UserError, check_choice
from supra.uptrain.config import UptrainConfig
from supra.uptrain.rules import check

STAGES = (FORWARD, "align", "distill", "tune")
# The settings of each variant. A run has no setting for "unfused"; see `run`.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "compile": {"compile": True},
    "checkpointing": {"gradient_checkpointing": True},
    "unfused": {},
    "fp32": {"precision": "fp32"},
}
WITHOUT = {FORWARD: ("checkpointing", "unfused"), "align": ("checkpointing",)}  # they do nothing
WARM_UP = 3  # steps: packed rows, rows of one document, and one more


@dataclass(frozen=True)
class Job:
    """One row. folder: has the teacher's name, the students and the text."""

    folder: str
    teacher: str
    mixer: str
    stage: str
    variant: str
    rows: int
    length: int
    steps: int
    threads: int
    peak_tflops: float | None

    @property
    def config(self) -> UptrainConfig:
        """Of a run that has this stage. Its folder is new for each row."""
        stage = "tune" if self.stage == FORWARD else self.stage
        count = self.rows * self.length * (WARM_UP + self.steps + 1)
        return UptrainConfig(
            student=f"{self.folder}/{self.mixer}",
            teacher=self.teacher if stage == "distill" else None,
            out=f"{self.folder}/{self.mixer}-{self.stage}-{self.variant}",
            data={
                "path": str(write_text(Path(self.folder, "text.jsonl"), count)),
                "sequence_length": self.length,
                "eval_documents": 0,
            },
            batch={"size": self.rows},
            **{stage: {"tokens": count}},
            **VARIANTS[self.variant],
        )


def report(
    model: str,
    *,
    mixers: Sequence[str],
    stages: Sequence[str] = (),
    variants: Sequence[str] = (),
    rows: int = 2,
    length: int = 512,
    steps: int = 3,
    peak_tflops: float | None = None,
    as_json: bool = False,
) -> None:
    """Print a line of text, or of JSON, for each mixer, stage and variant. Raises UserError."""
    for name, given, known in (("stages", stages, STAGES), ("variants", variants, VARIANTS)):
        for x in given:
            check_choice(name, x, tuple(known))
    if peak_tflops is not None and not 0 < peak_tflops < math.inf:
        raise UserError(f"--peak-tflops (={peak_tflops}) must be a number above 0")
    if not mixers:
        raise UserError("--mixer names no mixer: give one, --mixer mamba2 say")
    teacher = find_checkpoint(model)
    with tempfile.TemporaryDirectory() as folder:
        for mixer in mixers:
            with redirect_stdout(sys.stderr):  # what it says is no row
                convert(teacher.name, f"{folder}/{mixer}", mixer=mixer)
        jobs = [
            Job(
                folder, teacher.name, mixer, stage, variant, rows, length, steps,
                torch.get_num_threads(), peak_tflops,
            )
            for mixer, stage, variant in product(mixers, stages or STAGES, variants or VARIANTS)
            if variant not in WITHOUT.get(stage, ())
        ]  # fmt: skip
        for job in jobs:
            check(job.config)
        for job, values in measured(jobs):
            print(_json(job, values) if as_json else line(job, values), flush=True)


def measured(jobs: Sequence[Job]) -> Iterator[tuple[Job, dict[str, Any]]]:
    for job in jobs:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            yield job, pool.submit(run, job).result()


def run(job: Job) -> dict[str, Any]:
    """The values of a row, with the name of the machine."""
    torch.set_num_threads(job.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = {"only_forward": job.stage == FORWARD, "fused": job.variant != "unfused"}
    options["peak_tflops"] = job.peak_tflops
    values = measure(job.config, WARM_UP, job.steps, device, **options)
    return {"machine": processor(device)} | values


def line(job: Job, values: dict[str, Any]) -> str:
    """`mamba2, distill, compile: 160 tokens/s, 6,400 ms a step, …; backward 45 %, …`."""
    found = [
        f"{values['tokens_per_second']:,.0f} tokens/s",
        f"{values['step_ms']:,.0f} ms a step",
        f"{values['gflops_per_token']:.2f} GFLOPs a token",
        *([] if values["mfu"] is None else [f"MFU {values['mfu']:.3f}"]),
        f"{values['peak_gb']:.1f} GB",
    ]
    whole = sum(values["parts"].values())
    parts = [f"{name} {x / whole:.0%}" for name, x in values["parts"].items()]
    text = f"{job.mixer}, {job.stage}, {job.variant}: {', '.join(found)}"
    return "; ".join([text, ", ".join(parts)] if parts else [text])


def _json(job: Job, values: dict[str, Any]) -> str:
    names = ("mixer", "stage", "variant", "rows", "length", "steps")
    return to_json({name: getattr(job, name) for name in names} | values)
