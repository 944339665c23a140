"""A run's folder: config.yaml, log.jsonl, checkpoints/step-…/ and, when it is done, final/."""

import json
import math
import re
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import yaml

from supra.checkpoint.files import locked
from supra.errors import UserError
from supra.settings.yaml_text import to_yaml
from supra.uptrain import tree
from supra.uptrain.config import CheckpointConfig, UptrainConfig
from supra.uptrain.manifest import damage
from supra.uptrain.origin import ORIGIN
from supra.uptrain.run_log import RunLog, write_whole
from supra.uptrain.stages import Stage

# Settings that may change when a run continues, because they do not affect the training.
FREE = (
    "out",
    "resume",
    "trackers",
    "eval.",
    "checkpoint.",
    "data.workers",
    "distill.cache",
    "max_skipped_steps",
    "peak_tflops",
)
CHECKPOINT = re.compile(r"step-\d{8,}")


class RunFolder:
    """The files of a run, and the checks before it starts or continues."""

    def __init__(self, out: str | Path):
        self.path = Path(out).expanduser()
        self.config, self.log = self.path / "config.yaml", RunLog(self.path / "log.jsonl")
        self.final, self.checkpoints = self.path / "final", self.path / "checkpoints"

    def locked(self) -> AbstractContextManager[None]:
        """Make the folder and hold its lock. Raises UserError if another run holds it."""
        return locked(self.path)

    def all_checkpoints(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        found = (x for x in self.checkpoints.glob("step-*") if CHECKPOINT.fullmatch(x.name))
        return sorted(found, key=self.step_of)

    def last_checkpoint(self) -> Path | None:
        return max(self.all_checkpoints(), key=self.step_of, default=None)

    def best_checkpoint(self, held_out: str) -> tuple[Path | None, float]:
        """The checkpoint with the lowest held-out loss and that loss; the first of equal ones.
        None and infinity if no step with a checkpoint was evaluated.

        held_out: the digest of the held-out blocks; losses on other blocks do not count.
        """
        found = ((x, self.origin_of(x)) for x in self.all_checkpoints())
        losses = {x: fact["held_out_loss"] for x, fact in found if fact.get("held_out") == held_out}
        return min(losses.items(), key=lambda item: item[1], default=(None, math.inf))

    def find_checkpoint(
        self, config: UptrainConfig, stages: Sequence[Stage], accept_changed: bool
    ) -> tuple[Path | None, list[str]]:
        """The last checkpoint or None, and the accepted differences between this config and that of
        the checkpoint. Raises UserError for a damaged checkpoint or differences that are not
        accepted."""
        self.check(config)
        checkpoint = self.last_checkpoint()
        if checkpoint is None:
            return None, []
        changed = self.changes(config, passes_known="passes" in self.origin_of(checkpoint))
        if changed and not accept_changed:
            raise UserError(
                f"{self._another_config(changed)}, go back to that config, or "
                f"{_accept(checkpoint)} with this one"
            )
        self.check_whole(checkpoint)
        return checkpoint, changed + self._other_passes(checkpoint, config, stages, accept_changed)

    def _other_passes(
        self,
        checkpoint: Path,
        config: UptrainConfig,
        stages: Sequence[Stage],
        accept_changed: bool,
    ) -> list[str]:
        """The stages whose steps have another number of forward passes than before, over all
        processes. Raises UserError if there are some and changes are not accepted, or for steps
        whose rows cannot be read."""
        lanes, changed = self.lanes_of(checkpoint), []
        before = self.origin_of(checkpoint).get("passes")
        before = before or {stage.name: stage.accumulation * lanes for stage in stages}
        for stage in stages:
            passes, uneven = before.get(stage.name, stage.passes), stage.rows % lanes
            if passes == stage.passes and not uneven:
                continue
            what = f"{stage.name}: {passes} forward passes per step there, {stage.passes} here"
            if accept_changed and not uneven:
                changed.append(what)
                continue
            setting, accumulation = config.of_stage(stage.name, "batch.accumulation")
            processes = stage.passes // accumulation
            way = f"set {setting}={passes // processes}"
            if passes % processes:
                way = f"start a number of processes that divides {passes}"
            if not uneven:
                way += f", or {_accept(checkpoint)} with this size"
            raise UserError(
                f"{checkpoint} has steps of another size ({what}, which is {setting} "
                f"(={accumulation}) x processes): {way}"
            )
        return changed

    @staticmethod
    def lanes_of(checkpoint: Path) -> int:
        """The number of lanes of the text; see `Lanes`."""
        return len(list(checkpoint.glob("data-*.json")))

    def check(self, config: UptrainConfig) -> None:
        """Raise UserError for a run that is finished, that must not resume, or whose folder holds
        unknown files."""
        if self.final.exists():
            raise UserError(f"out (={self.path}) holds a finished run: choose another folder")
        if self.checkpoints.exists() and not self.checkpoints.is_dir():
            raise UserError(
                f"{self.checkpoints} is not a folder: move it away, or choose another out"
            )
        for path in self.checkpoints.glob("step-*"):
            if not CHECKPOINT.fullmatch(path.name) or not path.is_dir():
                raise UserError(f"{path} is not a checkpoint of a run: move it away")
        if self.last_checkpoint() is not None and not config.resume:
            raise UserError(
                f"out (={self.path}) holds an unfinished run: "
                "choose another folder, or set resume=true to continue it"
            )

    def check_whole(self, checkpoint: Path) -> None:
        """Raise UserError if a file of the checkpoint is damaged."""
        if found := damage(checkpoint):
            raise self.damaged(checkpoint, found)
        origin = self.origin_of(checkpoint)
        if origin and origin["step"] != self.step_of(checkpoint):
            raise self.damaged(checkpoint, f"it was written as step {origin['step']}")

    def damaged(self, checkpoint: Path, what: str) -> UserError:
        others = [path.name for path in self.all_checkpoints() if path != checkpoint]
        then = f"continues from {others[-1]}" if others else "starts from the beginning"
        return UserError(
            f"{checkpoint} is damaged: {what}. Delete that folder, and the same command {then}"
        )

    def check_origin(
        self, checkpoint: Path, origin: dict[str, str], accept_changed: bool
    ) -> list[str]:
        """The inputs of the run that have changed since the checkpoint was written. Raises
        UserError if there are some and changes are not accepted."""
        before = self.origin_of(checkpoint)
        changed = [name for name, now in origin.items() if before.get(name, now) != now]
        if changed and not accept_changed:
            raise UserError(
                f"{' and '.join(changed)} changed since {checkpoint} was written: restore the "
                f"original, choose another out folder, or {_accept(checkpoint)} with the change"
            )
        return [f"another {name}" for name in changed]

    def origin_of(self, checkpoint: Path) -> dict[str, Any]:
        """The step of a checkpoint, other numbers of that step, and the fingerprints of what its
        run reads; {} for checkpoints of earlier versions. Raises UserError for a damaged one."""
        file = checkpoint / ORIGIN
        try:
            return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        except ValueError as error:
            raise self.damaged(checkpoint, f"{ORIGIN} is not JSON") from error

    def skipped_steps(self, checkpoint: Path) -> int:
        """The number of skipped steps in a row with which a checkpoint ends."""
        return self.origin_of(checkpoint).get("skipped", 0)

    def check_same(self, config: UptrainConfig) -> None:
        """Raise UserError for a config that differs from the run's own in settings that affect the
        weights."""
        if changed := self.changes(config):
            raise UserError(f"{self._another_config(changed)}, or go back to that config")

    def _another_config(self, changed: list[str]) -> str:
        return (
            f"out (={self.path}) holds a run with another config ({'; '.join(changed)}): "
            "choose another folder"
        )

    def changes(self, config: UptrainConfig, passes_known: bool = False) -> list[str]:
        """The differences from the run's own config that affect the weights. If it is known how
        many forward passes a step has, accumulation does not, see `_other_passes`."""
        try:
            old = tree.flatten(yaml.safe_load(self.config.read_text(encoding="utf-8")))
            old = {"compile": False} | old  # earlier versions did not know it
        except (OSError, ValueError, AttributeError, RecursionError, yaml.YAMLError):
            return ["its config.yaml is missing or damaged"]
        new = tree.flatten(config.model_dump(mode="json"))
        return [
            f"{key}: {old.get(key)} there, {new.get(key)} here"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key)
            and not key.startswith(FREE)
            and not (passes_known and key.endswith("batch.accumulation"))
        ]

    def write_config(self, config: UptrainConfig) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        write_whole(self.config, to_yaml(config.model_dump(mode="json")))

    def prune(self, settings: CheckpointConfig, held_out: str) -> None:
        """Delete all but the last checkpoints and the best, as the settings say, and the remains of
        killed processes. `held_out` as in `best_checkpoint`."""
        for folder in self.checkpoints.glob(".step-*.partial"):
            shutil.rmtree(folder)
        best = self.best_checkpoint(held_out)[0] if settings.best else None
        for folder in self.all_checkpoints()[: -settings.keep]:
            if folder == best:
                continue
            # renamed first, so that a kill does not leave an incomplete checkpoint under this name
            hidden = folder.rename(folder.with_name(f".{folder.name}.partial"))
            shutil.rmtree(hidden)

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}"

    @staticmethod
    def step_of(checkpoint: Path) -> int:
        return int(checkpoint.name.removeprefix("step-"))


def _accept(checkpoint: Path) -> str:
    return f"give --accept-changed to continue from {checkpoint.name}"
