"""A run's folder: config.yaml, log.jsonl, checkpoints/step-…/ and, when it is done, final/."""

import json
import math
import re
import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import yaml

from supra.checkpoint.files import fsync, locked
from supra.errors import UserError
from supra.uptrain import tree
from supra.uptrain.config import UptrainConfig
from supra.uptrain.manifest import damage
from supra.uptrain.origin import ORIGIN

# settings that may change when a run continues, because they do not affect the weights
FREE = ("out", "resume", "trackers", "eval.", "checkpoint.", "distill.cache")
CHECKPOINT = re.compile(r"step-\d{8,}")


class RunFolder:
    def __init__(self, out: str | Path):
        self.path = Path(out).expanduser()
        self.config, self.log = self.path / "config.yaml", self.path / "log.jsonl"
        self.final, self.checkpoints = self.path / "final", self.path / "checkpoints"

    def locked(self) -> AbstractContextManager[None]:
        """Make the folder and hold its lock. Raises UserError if another run holds it."""
        return locked(self.path)

    def all_checkpoints(self) -> list[Path]:
        """Those that are complete, the oldest first."""
        found = (x for x in self.checkpoints.glob("step-*") if CHECKPOINT.fullmatch(x.name))
        return sorted(found, key=self.step_of)

    def last_checkpoint(self) -> Path | None:
        return max(self.all_checkpoints(), key=self.step_of, default=None)

    def find_checkpoint(
        self, config: UptrainConfig, accept_changed: bool
    ) -> tuple[Path | None, list[str]]:
        """The last checkpoint, checked for damage, or None; and the accepted differences between
        this config and its own. Raises UserError."""
        self.check(config)
        checkpoint = self.last_checkpoint()
        if checkpoint is None:
            return None, []
        changed = self.changes(config)
        if changed and not accept_changed:
            raise UserError(
                f"{self._another_config(changed)}, go back to that config, or "
                f"{_accept(checkpoint)} with this one"
            )
        self.check_whole(checkpoint)
        return checkpoint, changed

    def check(self, config: UptrainConfig) -> None:
        """Refuse to overwrite a run that is finished, that must not resume, or whose folder has
        been tampered with."""
        if self.final.exists():
            raise UserError(f"out (={self.path}) holds a finished run: choose another folder")
        if self.checkpoints.exists() and not self.checkpoints.is_dir():
            raise UserError(f"{self.checkpoints} is no folder: move it away, or choose another out")
        for path in self.checkpoints.glob("step-*"):
            if not CHECKPOINT.fullmatch(path.name) or not path.is_dir():
                raise UserError(f"{path} is no checkpoint of a run: move it away")
        if self.last_checkpoint() is not None and not config.resume:
            raise UserError(
                f"out (={self.path}) holds a run that was begun: "
                "choose another folder, or resume=true to continue it"
            )

    def check_whole(self, checkpoint: Path) -> None:
        """Refuse to continue from a checkpoint with a damaged file."""
        if found := damage(checkpoint):
            raise self.damaged(checkpoint, found)
        origin = self.origin_of(checkpoint)
        if origin and origin["step"] != self.step_of(checkpoint):
            raise self.damaged(checkpoint, f"it is of step {origin['step']}, under another name")

    def damaged(self, checkpoint: Path, what: str) -> UserError:
        others = [path.name for path in self.all_checkpoints() if path != checkpoint]
        goes_on = f"goes on from {others[-1]}" if others else "begins anew"
        return UserError(
            f"{checkpoint} is damaged: {what}. Delete that folder, and the same command {goes_on}"
        )

    def check_origin(
        self, checkpoint: Path, origin: dict[str, str], accept_changed: bool
    ) -> list[str]:
        """What the run reads that has changed since the checkpoint, if changes are accepted.
        Raises UserError if they are not."""
        before = self.origin_of(checkpoint)
        changed = [name for name, now in origin.items() if before.get(name, now) != now]
        if changed and not accept_changed:
            raise UserError(
                f"{' and '.join(changed)} changed since {checkpoint} was written: put back what "
                f"was there, choose another out folder, or {_accept(checkpoint)} with what is "
                "there now"
            )
        return [f"another {name}" for name in changed]

    def origin_of(self, checkpoint: Path) -> dict[str, Any]:
        """The step of a checkpoint and the fingerprints of what its run reads; {} for checkpoints
        of earlier versions."""
        file = checkpoint / ORIGIN
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    def check_same(self, config: UptrainConfig) -> None:
        """Refuse a config that differs from the run's own in what affects the weights."""
        if changed := self.changes(config):
            raise UserError(f"{self._another_config(changed)}, or go back to that config")

    def _another_config(self, changed: list[str]) -> str:
        return (
            f"out (={self.path}) holds a run with another config ({'; '.join(changed)}): "
            "choose another folder"
        )

    def changes(self, config: UptrainConfig) -> list[str]:
        """The differences from the run's own config that affect the weights."""
        try:
            old = tree.flatten(yaml.safe_load(self.config.read_text(encoding="utf-8")))
        except (OSError, ValueError, AttributeError, RecursionError, yaml.YAMLError):
            return ["its config.yaml is missing or damaged"]
        new = tree.flatten(config.model_dump(mode="json"))
        return [
            f"{key}: {old.get(key)} there, {new.get(key)} here"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key) and not key.startswith(FREE)
        ]

    def write_config(self, config: UptrainConfig) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        _write(self.config, text)

    def truncate_log(self, step: int) -> int:
        """Drop what an interrupted run logged after the checkpoint of `step`, and broken lines.
        Returns how many steps up to the checkpoint are in the log.

        At step 0 there is no checkpoint, and everything in the log will happen again.
        """
        if not self.log.exists():
            return 0
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        kept = [line for line in lines if step > 0 and _step(line) <= step]
        _write(self.log, "".join(f"{line}\n" for line in kept))
        return len({_step(line) for line in kept if "loss" in json.loads(line)})

    def perplexities(self) -> dict[str, dict[str, float]]:
        """The last held-out perplexity of every model in the log, for the model card."""
        names = {"teacher": "teacher", "converted": "converted", "eval": "uptrained"}
        found = {}
        for line in self.log.read_text(encoding="utf-8").splitlines():
            for key, value in json.loads(line).items():
                name = names.get(key.removesuffix("_perplexity"))
                if name and key.endswith("_perplexity"):
                    found[name] = {"held-out perplexity": value}
        return found

    def logged(self, step: int, key: str) -> float | None:
        """What was logged last under `key` at `step`."""
        lines = map(json.loads, self.log.read_text(encoding="utf-8").splitlines())
        values = [line[key] for line in lines if line["step"] == step and key in line]
        return values[-1] if values else None

    def prune(self, keep: int) -> None:
        """Delete all but the last `keep` checkpoints, and what killed processes left behind."""
        for folder in self.checkpoints.glob(".step-*.partial"):
            shutil.rmtree(folder)
        for folder in self.all_checkpoints()[:-keep]:
            # renamed first: a kill must not leave half of a checkpoint under its name
            hidden = folder.rename(folder.with_name(f".{folder.name}.partial"))
            shutil.rmtree(hidden)

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}"

    @staticmethod
    def step_of(checkpoint: Path) -> int:
        return int(checkpoint.name.removeprefix("step-"))


def _accept(checkpoint: Path) -> str:
    return f"give --accept-changed to go on from {checkpoint.name}"


def _step(line: str) -> float:
    """The step of a log line; infinity for a broken line, as a killed process leaves one."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
    return step if isinstance(step, int) else math.inf


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    fsync(partial)
    partial.replace(path)
