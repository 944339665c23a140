"""The speed of training: whole steps of `supra uptrain`, without its loading and saving."""

from collections.abc import Callable
from typing import Any

import torch

from supra.bench.timing import forget_peak_memory, peak_memory, processor
from supra.bench.train.clock import now, seconds_by_part
from supra.planning.plan import flops_per_token
from supra.uptrain.config import UptrainConfig
from supra.uptrain.loop import Run

# peak of products in bfloat16 without sparsity, 10^12 FLOPs a second, by a part of the GPU's name
PEAKS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312, "B200": 2250}
FORWARD = "forward"  # the student alone, without gradients


def measure(
    config: UptrainConfig,
    warm_up: int,
    steps: int,
    device: str,
    *,
    only_forward: bool = False,
    fused: bool = True,
    peak_tflops: float | None = None,
) -> dict[str, Any]:
    """Tokens per second of the steps after the first ones, and the share of the device's peak.

    Args:
        config: of a run with one stage. Its folder `out` gets a log and nothing else.
        warm_up, steps: steps before the clock runs, and while it runs.
        only_forward: of a step's rows, the student's forward pass alone.
        fused: whether AdamW updates all weights of a kind in one kernel, as it does in runs.
        peak_tflops: of the device; None for the one in PEAKS, if it is there.

    Returns tokens_per_second, step_ms, gflops_per_token, mfu (None without a peak), peak_gb, and
    parts: seconds of the parts of one step.
    """
    run = Run(config)
    try:
        for group in run.optimizer.param_groups:
            group["fused"] = fused
        step = run.train_step if not only_forward else _forward(run)
        for _ in range(warm_up):
            step()
        forget_peak_memory(device)
        started = now(device)
        for _ in range(steps):
            step()
        seconds = (now(device) - started) / steps
        peak = peak_memory(device)
        parts = {} if only_forward else seconds_by_part(run, device)
        tokens = run.stage.tokens_per_step
    finally:
        run.close()
    (flops,) = flops_per_token(config).values()
    flops = flops / 3 if only_forward else flops  # a backward pass takes twice as many
    most = peak_tflops * 1e12 if peak_tflops else device_peak(device)
    return {
        "tokens_per_second": tokens / seconds,
        "step_ms": 1e3 * seconds,
        "gflops_per_token": flops / 1e9,
        "mfu": tokens / seconds * flops / most if most else None,
        "peak_gb": peak / 1e9,
        "parts": parts,
    }


def _forward(run: Run) -> Callable[[], None]:
    """A function that reads the rows of a step, and runs the student on them one by one."""
    device = run.accelerator.device

    @torch.no_grad()
    def step() -> None:
        for block in run.stream.step(run.stage.rows):
            inputs = {x: block[x][None].to(device) for x in ("input_ids", "position_ids")}
            with run.autocast():
                run.model(**inputs, use_cache=False)

    return step


def device_peak(device: str) -> float | None:
    """FLOPs a second that the GPU can do; None for one that is not in the table."""
    name = processor(device)
    return next((1e12 * peak for part, peak in PEAKS.items() if part in name), None)
