"""Finds runs that diverge: steps that are not finite are skipped, and too many of them end the
run."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from supra.data.packing import Block
from supra.errors import Diverged
from supra.uptrain.finite import first_not_finite
from supra.uptrain.stages import Stage


class Divergence:
    """All processes call it with the same numbers.

    most: the maximum of skipped steps in a row. fail: makes the error from what happened.
    skipped: how many steps in a row were skipped, up to the last step. said: the line about the
    last skipped step.
    """

    def __init__(self, most: int, fail: Callable[[str], Diverged]):
        self.most, self.fail = most, fail
        self.skipped, self.said = 0, ""
        self.row: Block | None = None  # the first row of the last step that was not skipped

    def accepts(self, step: int, values: Mapping[str, float], batch: Block) -> bool:
        """Whether the loss and the gradient of a step on `batch` are finite; if not, the step is to
        be left out. Raises Diverged after too many in a row."""
        if math.isfinite(values["loss"] + values["grad_norm"]):
            self.row, self.skipped = {name: x[:1] for name, x in batch.items()}, 0
            return True
        what = (
            f"step {step}: the loss is {values['loss']} and the gradient norm {values['grad_norm']}"
        )
        if self.skipped >= self.most:
            before = f", after {self.skipped} skipped steps in a row" if self.skipped else ""
            raise self.fail(f"{what}{before}; this step changed no weights")
        self.skipped += 1
        self.said = f"{what}: it is skipped, {self.skipped} of at most {self.most} in a row"
        return False

    def check(
        self,
        step: int,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
    ) -> None:
        """Raises Diverged in every process if weights or outputs are not finite after a step."""
        if found := first_not_finite(model, optimizer, self.row, device):
            raise self.fail(f"after step {step} {found} overflowed: nothing is saved")


def diverged(what: str, stage: Stage, checkpoint: Path | None) -> Diverged:
    """The error for a stage whose numbers overflowed; `checkpoint` is the last good one."""
    way_out = "the same command then starts from the beginning"
    if checkpoint:
        way_out = f"--accept-changed then continues from {checkpoint.name} with the new rate"
    config = stage.config
    return Diverged(
        f"{what}. Lower {stage.name}.optimizer.lr (={config.optimizer.lr}) or lengthen "
        f"{stage.name}.schedule.warmup (={config.schedule.warmup}): {way_out}"
    )
