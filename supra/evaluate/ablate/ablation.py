"""`supra eval ablate`: what perplexity does not show about a model; each part has a file."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from supra.checkpoint.opening import Checkpoint
from supra.data.blocks import blocks_from_text
from supra.data.packing import Block, start_tokens, text_tokens
from supra.data.text import open_documents
from supra.errors import UserError, check_choice
from supra.evaluate.ablate.floors import measure_floors
from supra.evaluate.ablate.labels import build_questions, measure_labels
from supra.evaluate.ablate.layer_errors import check_teacher, measure_layer_errors
from supra.evaluate.ablate.lookback import TOKENS as TOKENS_OF_ROW
from supra.evaluate.ablate.lookback import cut_rows, measure_look_back
from supra.evaluate.ablate.samples import generate_samples
from supra.evaluate.perplexity import Perplexity, perplexity
from supra.evaluate.tasks.recall import LENGTHS, measure_recall
from supra.evaluate.text_perplexity import TextResult, check_sizes, position_edges
from supra.model.loading import load_model
from supra.model.positions import check_positions

TOKENS = 8192  # default number of tokens to read: some minutes for 135M parameters on two cores
COMPARED = ("floors", "layers", "lookback")  # parts that use the teacher


@dataclass(frozen=True)
class Diagnosis:
    """`parts` has the results by name; `left_out` says why the other parts are missing."""

    text: TextResult
    parts: dict[str, Any] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        parts = {name: asdict(part) for name, part in self.parts.items()}
        return {**self.text.as_dict(), **parts, "left_out": self.left_out}

    def lines(self) -> list[str]:
        lines = self.text.lines()
        for part in self.parts.values():
            lines += ["", *part.lines()]
        if self.left_out:
            lines += ["", *(f"without {name}: {why}" for name, why in self.left_out.items())]
        return lines


@dataclass(frozen=True)
class Subject:
    """A model and what it is tested on."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    teacher: PreTrainedModel | None
    documents: list[str]  # the documents in the blocks
    blocks: list[Block]
    batch: int  # blocks per forward pass
    edges: list[int]  # edges of the position buckets
    intact: Perplexity
    recall_lengths: Sequence[int]
    seed: int

    def token_rows(self) -> list[list[int]]:
        """The documents' tokens without start and end tokens."""
        return [text_tokens(self.tokenizer, x) for x in self.documents if not x.isspace()]


def _floors(x: Subject) -> Any:
    options = {"batch_size": x.batch, "intact": x.intact, "teacher": x.teacher}
    return measure_floors(x.model, x.blocks, x.edges, **options)


def _layers(x: Subject) -> Any:
    if x.teacher is None:
        raise UserError("layer errors compare with a teacher: give --teacher")
    return measure_layer_errors(x.model, x.teacher, x.blocks, batch_size=x.batch)


def _look_back(x: Subject) -> Any:
    start = start_tokens(x.tokenizer)
    rows = cut_rows(x.token_rows(), TOKENS_OF_ROW - len(start))
    return measure_look_back(x.model, [start + row for row in rows], x.teacher)


def _recall(x: Subject) -> Any:
    filler = [token for row in x.token_rows() for token in row]
    options = {"lengths": x.recall_lengths, "seed": x.seed}
    return measure_recall(x.model, x.tokenizer, filler, **options)


def _labels(x: Subject) -> Any:
    return measure_labels(x.model, x.tokenizer, build_questions(x.documents, x.seed))


def _samples(x: Subject) -> Any:
    return generate_samples(x.model, x.tokenizer, x.token_rows())


PARTS: dict[str, Callable[[Subject], Any]] = {
    "floors": _floors,
    "layers": _layers,
    "lookback": _look_back,
    "recall": _recall,
    "labels": _labels,
    "samples": _samples,
}


def diagnose(
    checkpoint: Checkpoint,
    text: str,
    *,
    parts: Sequence[str] = (),
    teacher: Checkpoint | None = None,
    recall_lengths: Sequence[int] = LENGTHS,
    text_field: str = "text",
    sequence_length: int = 2048,
    tokens: int | None = None,
    batch: int = 4,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> Diagnosis:
    """Perplexity of a model on `text`, and the named parts of PARTS.

    Without names, all parts that apply: parts about mixers are left out for a model that is not
    converted, and the layers' errors without a teacher. A named part that does not apply raises
    UserError.
    """
    tokens = TOKENS if tokens is None else tokens
    check_sizes(sequence_length, batch, tokens)
    _check_parts(parts, teacher, recall_lengths)
    tokenizer, documents = checkpoint.tokenizer(), []
    read = _kept(open_documents(text, text_field).epoch(0), documents)
    blocks = blocks_from_text(tokenizer, read, sequence_length, tokens)
    model = load_model(checkpoint, dtype)
    check_positions(model, "--sequence-length", sequence_length)
    if teacher is not None:
        teacher = load_model(teacher, model.dtype)
        check_teacher(model, teacher)
    edges = position_edges(sequence_length)
    with tqdm(total=1 + len(parts or PARTS), unit="part", disable=not progress) as bar:
        bar.set_description("perplexity")
        intact = perplexity(model, blocks, by_position=edges, batch_size=batch)
        bar.update()
        result = Diagnosis(TextResult(checkpoint.name, text, sequence_length, **asdict(intact)))
        subject = Subject(
            model, tokenizer, teacher, documents, blocks, batch, edges, intact, recall_lengths, seed
        )
        _measure(subject, parts, result, bar)
    return result


def _measure(subject: Subject, parts: Sequence[str], result: Diagnosis, bar: tqdm) -> None:
    """Add the named parts to the result; without names, all parts that apply."""
    for name in parts or PARTS:
        bar.set_description(name)
        try:
            result.parts[name] = PARTS[name](subject)
        except UserError as error:
            if parts:
                raise
            result.left_out[name] = str(error)
        bar.update()


def _check_parts(
    parts: Sequence[str], teacher: Checkpoint | None, recall_lengths: Sequence[int]
) -> None:
    """Raise UserError for an unknown part, and for arguments that do not fit the parts."""
    if recall_lengths and min(recall_lengths) < 1:
        raise UserError(f"--recall-lengths (={min(recall_lengths)}) must be at least 1")
    for name in parts:
        check_choice("part", name, PARTS)
    if teacher is not None and not set(COMPARED) & set(parts or PARTS):
        raise UserError(
            f"--teacher (={teacher.name}) is only used for {', '.join(COMPARED)}: leave it out"
        )


def _kept(texts: Iterator[str], kept: list[str]) -> Iterator[str]:
    """The same texts; they are also added to `kept`."""
    for text in texts:
        kept.append(text)
        yield text
