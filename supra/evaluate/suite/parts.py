"""The parts of the suite, ready to be measured. All mistakes in names and files are found here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from supra.checkpoint.files import fingerprint
from supra.errors import UserError
from supra.evaluate.suite import in_context, wikitext
from supra.evaluate.suite.data import TEXT, find_file, read_records
from supra.evaluate.suite.measure import Measure
from supra.settings.recipe_files import RECIPES

TASK_FILES = RECIPES / "tasks"
LOCAL = ("lambada", "piqa", "blimp")  # in the order of a table
OWN = (*LOCAL, wikitext.PART, in_context.PART)


@dataclass(frozen=True)
class Settings:
    """What the numbers depend on besides model and data.

    limit: the maximum number of items of a part, spread evenly; None for all.
    """

    limit: int | None = None
    shots: Sequence[int] = in_context.SHOTS
    sequence_length: int = wikitext.SEQUENCE_LENGTH  # of its rows
    seed: int = 0  # of the shots


@dataclass(frozen=True)
class Part:
    """A part of the suite.

    source: all that its numbers depend on besides the model.
    measure: (model, tokenizer, batch=…, bar=…) -> measures
    """

    name: str
    source: dict[str, Any]
    measure: Callable[..., list[Measure]]


def prepare_parts(names: Sequence[str], folder: Path, settings: Settings) -> list[Part]:
    """The parts of these names, or the suite's own.

    Raises UserError for a name that nobody knows, for missing files and for bad records.
    """
    names = list(dict.fromkeys(names or OWN))
    others = [name for name in names if name not in OWN]
    if needy := [name for name in names if name in LOCAL or name in others]:
        _need_harness(needy[0])
    prepared = {}
    for name in (name for name in names if name in OWN):
        prepared[name] = _PREPARE[name](name, folder, settings)
    prepared |= _of_the_harness(others, settings)
    return [prepared[name] for name in names]


def _need_harness(name: str) -> None:
    if find_spec("lm_eval") is None:
        raise UserError(
            f"task {name!r} runs in lm-evaluation-harness, which is not installed: "
            f"pip install 'supra-rnn[eval]'; {wikitext.PART} and {in_context.PART} run without it"
        )


def _local_task(name: str, folder: Path, settings: Settings) -> Part:
    """A task of recipes/tasks on a file of the folder."""
    from supra.evaluate.suite import harness

    config = yaml.safe_load((TASK_FILES / f"{name}.yaml").read_text(encoding="utf-8"))
    files = config["dataset_kwargs"]["data_files"]
    file = find_file(folder, files["test"], name)
    read_records(file, config["metadata"]["fields"])
    files["test"] = str(file.absolute())
    tasks = harness.load_tasks(harness.task_manager(own=False), config)
    return _harness_part(name, tasks, settings, {"data": fingerprint([file])})


def _of_the_harness(names: Sequence[str], settings: Settings) -> dict[str, Part]:
    if not names:
        return {}
    from supra.evaluate.suite import harness

    manager = harness.task_manager(own=True)
    loaded = {name: harness.load_tasks(manager, name) for name in names}
    return {name: _harness_part(name, tasks, settings, {}) for name, tasks in loaded.items()}


def _harness_part(name: str, tasks: Any, settings: Settings, source: dict[str, Any]) -> Part:
    from supra.evaluate.suite import harness

    source = {**source, "lm_eval": version("lm_eval"), "limit": settings.limit}
    measure = partial(harness.measure_tasks, name, tasks, limit=settings.limit)
    return Part(name, source, measure)


def _wikitext(name: str, folder: Path, settings: Settings) -> Part:
    file = find_file(folder, "wikitext*.jsonl*", name)
    texts = [record["text"] for record in read_records(file, {"text": TEXT})]
    source = {
        "data": fingerprint([file]),
        "limit": settings.limit,
        "sequence_length": settings.sequence_length,
    }
    measure = partial(
        wikitext.measure_wikitext,
        texts,
        limit=settings.limit,
        sequence_length=settings.sequence_length,
    )
    return Part(name, source, measure)


def _in_context(name: str, folder: Path, settings: Settings) -> Part:
    if not settings.shots or min(settings.shots) < 0:
        raise UserError("--shots must name numbers of examples, such as 0,4,16")
    file = find_file(folder, "icl*.jsonl*", name)
    records = read_records(file, in_context.FIELDS)
    shots = sorted(set(settings.shots))
    sets = in_context.draw_sets(records, shots, settings.limit, settings.seed)
    source = {
        "data": fingerprint([file]),
        "limit": settings.limit,
        "shots": shots,
        "seed": settings.seed,
    }
    measure = partial(in_context.measure_in_context, sets=sets, shots=shots)
    return Part(name, source, measure)


_PREPARE = dict.fromkeys(LOCAL, _local_task) | {
    wikitext.PART: _wikitext,
    in_context.PART: _in_context,
}
