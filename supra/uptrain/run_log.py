"""A run's log.jsonl: what it says, and what is left of it when a run continues."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from supra.checkpoint.files import fsync


class RunLog:
    """One line of JSON per step, and one per evaluation; `Log` writes them."""

    def __init__(self, path: Path):
        self.path = path

    def truncate(self, step: int) -> int:
        """Drop broken lines and what an interrupted run logged after the checkpoint of `step`.

        At step 0 there is no checkpoint, and the log is emptied. Returns the number of steps that
        are left in the log.
        """
        if not self.path.exists():
            return 0
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        kept = [line for line in lines if step > 0 and _step(line) <= step]
        write_whole(self.path, "".join(f"{line}\n" for line in kept))
        return len({_step(line) for line in kept if json.loads(line).keys() & {"loss", "skipped"}})

    def perplexities(self, step: int) -> dict[str, dict[str, float]]:
        """The last held-out perplexity of every model up to `step`, for the model card."""
        names = {"teacher": "teacher", "converted": "converted", "eval": "uptrained"}
        found = {}
        for line in self._lines():
            for key, value in line.items() if line["step"] <= step else ():
                name = names.get(key.removesuffix("_perplexity"))
                if name and key.endswith("_perplexity"):
                    found[name] = {"held-out perplexity": value}
        return found

    def last(self, step: int, key: str) -> float | None:
        """The last value that was logged under `key` at `step`."""
        values = [line[key] for line in self._lines() if line["step"] == step and key in line]
        return values[-1] if values else None

    def training_seconds(self) -> float:
        """The time of all steps, without evaluations and checkpoints between them."""
        seconds, before = 0.0, 0
        for line in self._lines():
            if "tokens_per_second" in line:
                seconds += (line["tokens"] - before) / line["tokens_per_second"]
                before = line["tokens"]
        return seconds

    def _lines(self) -> Iterator[dict[str, Any]]:
        yield from map(json.loads, self.path.read_text(encoding="utf-8").splitlines())


def write_whole(path: Path, text: str) -> None:
    """Write a text file, completely or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    fsync(partial)
    partial.replace(path)


def _step(line: str) -> float:
    """The step of a log line; infinity for a broken line, which a killed process may leave."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
    return step if isinstance(step, int) else math.inf
