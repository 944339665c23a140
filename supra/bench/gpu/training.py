"""The speed of training: whole steps of `supra uptrain`, without its loading and saving."""

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from supra.bench.gpu.models import TEACHER, Sizes, model, text
from supra.bench.timing import forget_peak_memory, peak_memory, processor
from supra.checkpoint.opening import find_checkpoint
from supra.planning.hardware import Gpus, Hardware, Rate
from supra.planning.measure import Models
from supra.planning.plan import plan
from supra.uptrain.config import UptrainConfig
from supra.uptrain.loop import Run

STAGES = ("align", "distill", "tune")
# peak of products in bfloat16 without sparsity, 10^12 FLOPs a second, by a part of the GPU's name
PEAKS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312, "B200": 2250}


def measure(folder: Path, mixer: str, stage: str, sizes: Sizes, device: str) -> dict[str, Any]:
    """Tokens per second of the steps after the first ones, and the share of the GPU's peak."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        config = _config(folder, mixer, stage, sizes, out)
        flops = _flops(config)
        seconds = _seconds(Run(config), sizes, device)
    speed, peak = sizes.rows * sizes.length / seconds, _peak(device)
    return {
        "tokens_per_second": speed,
        "step_ms": 1e3 * seconds,
        "gflops_per_token": flops / 1e9,
        "mfu": speed * flops / peak if peak else None,
        "peak_gb": peak_memory(device) / 1e9,
    }


def _seconds(run: Run, sizes: Sizes, device: str) -> float:
    """Of one step."""
    try:
        for _ in range(sizes.warm_up):
            run.train_step()
        forget_peak_memory(device)
        started = _now(device)
        for _ in range(sizes.steps):
            run.train_step()
        return (_now(device) - started) / sizes.steps
    finally:
        run.close()


def _config(folder: Path, mixer: str, stage: str, sizes: Sizes, out: str) -> UptrainConfig:
    tokens = sizes.rows * sizes.length * (sizes.warm_up + sizes.steps)
    return UptrainConfig(
        student=str(model(folder, mixer, sizes)),
        teacher=str(model(folder, TEACHER, sizes)) if stage == "distill" else None,
        out=out,
        data={
            "path": str(text(folder, sizes)),
            "sequence_length": sizes.length,
            "eval_documents": 0,
        },
        batch={"size": sizes.rows},
        **{stage: {"tokens": tokens}},
    )


def _flops(config: UptrainConfig) -> float:
    """Per token, as `supra plan` counts them."""
    student, teacher = (
        find_checkpoint(x).config() if x else None for x in (config.student, config.teacher)
    )
    one = Hardware(Gpus(1, 80), launch="one_gpu")
    (stage,) = plan(config, Models(student, teacher), one, Rate()).stages
    return stage.flops / stage.tokens


def _peak(device: str) -> float | None:
    """FLOPs a second that the GPU can do; None for one that is not in the table."""
    name = processor(device)
    return next((1e12 * peak for part, peak in PEAKS.items() if part in name), None)


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
