"""A run's folder: config.yaml, log.jsonl, checkpoints/step-…/ and, when it is done, final/."""

import json
import shutil
from pathlib import Path

import yaml

from supra.errors import UserError
from supra.files import fsync
from supra.uptrain import tree
from supra.uptrain.config import UptrainConfig

# what may change when a run goes on: none of it touches the weights
FREE = ("out", "resume", "trackers", "eval.", "checkpoint.", "distill.cache")


class RunFolder:
    def __init__(self, out: str | Path):
        self.path = Path(out).expanduser()
        self.config, self.log = self.path / "config.yaml", self.path / "log.jsonl"
        self.final, self.checkpoints = self.path / "final", self.path / "checkpoints"

    def last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint."""
        return max(self.checkpoints.glob("step-*"), default=None)

    def check(self, config: UptrainConfig) -> None:
        """Refuse to write over a run that is finished, another one, or not to go on."""
        if self.final.exists():
            raise UserError(f"out (={self.path}) holds a finished run: choose another folder")
        if self.last_checkpoint() is None:
            return
        if not config.resume:
            raise UserError(
                f"out (={self.path}) holds a run that was begun: "
                "choose another folder, or resume=true to continue it"
            )
        self.check_same(config)

    def check_same(self, config: UptrainConfig) -> None:
        """Refuse another config than the run's own, where that matters to the weights."""
        old = tree.flatten(yaml.safe_load(self.config.read_text(encoding="utf-8")))
        new = tree.flatten(tree.to_dict(config))
        changed = [
            f"{key}: {old.get(key)} there, {new.get(key)} here"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key) and not key.startswith(FREE)
        ]
        if changed:
            raise UserError(
                f"out (={self.path}) holds a run with another config "
                f"({'; '.join(changed)}): choose another folder, or go back to that config"
            )

    def write_config(self, config: UptrainConfig) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(tree.to_dict(config), sort_keys=False)
        _write(self.config, text)

    def truncate_log(self, step: int) -> None:
        """Drop what an interrupted run logged after the checkpoint of `step`.

        At step 0 it had none, and all that it logged happens again.
        """
        if self.log.exists():
            lines = self.log.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = (line for line in lines if step > 0 and _step(line) <= step)
            _write(self.log, "".join(kept))

    def perplexities(self) -> dict[str, dict[str, float]]:
        """The last held-out perplexity of every model in the log, as the model card has it."""
        names = {"teacher": "teacher", "converted": "converted", "eval": "uptrained"}
        found = {}
        for line in self.log.read_text(encoding="utf-8").splitlines():
            for key, value in json.loads(line).items():
                if key.endswith("_perplexity"):
                    name = names[key.removesuffix("_perplexity")]
                    found[name] = {"held-out perplexity": value}
        return found

    def logged(self, step: int, key: str) -> float | None:
        """What was logged last under `key` at `step`."""
        lines = map(json.loads, self.log.read_text(encoding="utf-8").splitlines())
        values = [line[key] for line in lines if line["step"] == step and key in line]
        return values[-1] if values else None

    def prune(self, keep: int) -> None:
        for folder in sorted(self.checkpoints.glob("step-*"))[:-keep]:
            shutil.rmtree(folder)

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}"

    @staticmethod
    def step_of(checkpoint: Path) -> int:
        return int(checkpoint.name.removeprefix("step-"))


def _step(line: str) -> float:
    """The step of a log line; infinity for the line that a killed process left half written."""
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        return float("inf")


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    fsync(partial)
    partial.replace(path)
