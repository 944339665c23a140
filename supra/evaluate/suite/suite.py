"""`supra eval suite`: what a student keeps of its teacher's ability, and what it loses."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from supra.checkpoint.card import check_card, write_measured
from supra.checkpoint.opening import Checkpoint
from supra.errors import UserError
from supra.evaluate.suite import report
from supra.evaluate.suite.data import check_folder
from supra.evaluate.suite.kept_parts import KeptParts
from supra.evaluate.suite.measure import WORDS, Comparison, Measure
from supra.evaluate.suite.parts import Part, Settings, prepare_parts
from supra.evaluate.suite.picture import draw_suite
from supra.evaluate.tasks.heat_map import check_heat_map
from supra.model.loading import load_model

BATCH = 8


@dataclass(frozen=True)
class SuiteResult:
    """teacher, theirs: the teacher's name and its measures; None and empty without a teacher."""

    model: str
    teacher: str | None
    settings: Settings
    ours: list[Measure]
    theirs: list[Measure]

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """Empty without a teacher."""
        if self.teacher is None:
            return []
        pairs = zip(self.theirs, self.ours, strict=True)
        return [Comparison(teacher, student) for teacher, student in pairs]

    @property
    def words(self) -> dict[str, list[str]]:
        """The titles of the measures by word: kept, weakened, lost, unclear."""
        found: dict[str, list[str]] = {word: [] for word in WORDS}
        for pair in self.comparisons:
            if not pair.student.detail:
                found[pair.word].append(pair.student.title)
        return found

    def as_dict(self) -> dict[str, Any]:
        """The numbers of every measure, by its title, and what they were measured with."""
        names = {"model": self.model, "teacher": self.teacher, **asdict(self.settings)}
        if self.teacher is None:
            found = {x.title: {**x.described(), "model": x.numbers()} for x in self.ours}
            return {**names, "measures": found}
        measures = {pair.student.title: pair.as_dict() for pair in self.comparisons}
        return {**names, "measures": measures, "words": self.words}

    def lines(self) -> list[str]:
        """The results for a terminal."""
        if self.teacher is None:
            return report.lines_alone(self.model, self.ours)
        return report.lines(self.model, self.teacher, self.comparisons, self.words)

    def draw(self, file: Path) -> None:
        """Write the picture to a file."""
        draw_suite(file, Path(self.model).name, self.ours, self.comparisons)


def evaluate_suite(
    checkpoint: Checkpoint,
    data: str | Path,
    *,
    teacher: Checkpoint | None = None,
    tasks: Sequence[str] = (),
    settings: Settings | None = None,
    batch: int = BATCH,
    dtype: torch.dtype | None = None,
    out: Path | None = None,
    picture: Path | None = None,
    card: bool = False,
    progress: bool = False,
) -> SuiteResult:
    """Measure a model, and its teacher beside it, on the evaluation sets in the folder `data`.

    Args:
        tasks: names of parts: lambada, piqa, blimp, wikitext, in_context (the default is these
            five), and of tasks of lm-evaluation-harness.
        batch: rows of a forward pass. The results do not depend on it.
        out: a folder for the results of finished parts, which are not measured again.
        picture: a file for a picture of the results.
        card: write the table into the model card in the folder of the checkpoint.

    Raises UserError for missing files, bad records, unknown tasks and a teacher with another
    vocabulary, before a model is loaded.
    """
    settings = settings or Settings()
    _check_output(out, picture)
    if card:
        _check_card(checkpoint, teacher)
    if teacher is not None:
        _check_vocabulary(checkpoint, teacher)
    parts = prepare_parts(tasks, check_folder(data), settings)
    options = {"batch": batch, "dtype": dtype, "kept": KeptParts(out), "progress": progress}
    theirs = [] if teacher is None else measure_model(teacher, parts, **options)
    ours = measure_model(checkpoint, parts, **options)
    name = None if teacher is None else teacher.name
    result = SuiteResult(checkpoint.name, name, settings, ours, theirs)
    if picture is not None:
        result.draw(picture)
    if card:
        text = report.card(teacher.public_name, result.comparisons, result.words, settings)
        write_measured(checkpoint.folder, text)
    return result


def measure_model(
    checkpoint: Checkpoint,
    parts: Sequence[Part],
    *,
    batch: int = BATCH,
    dtype: torch.dtype | None = None,
    kept: KeptParts | None = None,
    progress: bool = False,
) -> list[Measure]:
    """The measures of all parts. The model is loaded when the first part is not kept."""
    kept = kept or KeptParts(None)
    measures: list[Measure] = []
    model = tokenizer = None
    for part in parts:
        source = {**part.source, **_identity(checkpoint, dtype)}
        found = kept.find(part.name, source)
        if found is None:
            if model is None:
                model, tokenizer = load_model(checkpoint, dtype).eval(), checkpoint.tokenizer()
            name = f"{checkpoint.public_name}: {part.name}"
            with tqdm(desc=name, total=0, unit="row", disable=not progress) as bar:
                found = part.measure(model, tokenizer, batch=batch, bar=bar)
            kept.keep(part.name, source, found)
        measures += found
    return measures


def _identity(checkpoint: Checkpoint, dtype: torch.dtype | None) -> dict[str, Any]:
    """What the numbers depend on of a model."""
    return {
        "model": checkpoint.fingerprint(),
        "tokenizer": checkpoint.tokenizer_fingerprint(),
        "dtype": None if dtype is None else str(dtype),
    }


def _check_output(out: Path | None, picture: Path | None) -> None:
    if out is not None and out.is_file():
        raise UserError(f"--out (={out}) is a file: name a folder")
    if picture is not None:
        check_heat_map(picture)


def _check_vocabulary(checkpoint: Checkpoint, teacher: Checkpoint) -> None:
    """Raise UserError if the same text would be other tokens for the two models."""
    ours, theirs = (x.tokenizer().get_vocab() for x in (checkpoint, teacher))
    if ours != theirs:
        raise UserError(
            f"--teacher (={teacher.name}) has another vocabulary than the model: {len(theirs)} "
            f"words, and the model has {len(ours)}; give the checkpoint that it was converted from"
        )


def _check_card(checkpoint: Checkpoint, teacher: Checkpoint | None) -> None:
    if teacher is None:
        raise UserError("--card writes the table that compares with a teacher: give --teacher")
    if checkpoint.hub_id is not None or checkpoint.gguf_file is not None:
        raise UserError(
            f"--card needs a local folder with a model card: {checkpoint.name} is not one"
        )
    check_card(checkpoint.folder)
