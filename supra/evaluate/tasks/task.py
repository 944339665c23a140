"""`supra eval task`: how well a model answers rows of a synthetic language, by row length."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from random import Random
from typing import Any

import torch
from tqdm import tqdm

from supra.checkpoint.opening import Checkpoint
from supra.data.packing import start_tokens
from supra.data.synthetic import LANGUAGES, Language, MultiQueryRecall
from supra.errors import UserError, check_choice
from supra.evaluate.tasks.prompts import single_token_words
from supra.evaluate.tasks.recall import draw_examples, recall_accuracy
from supra.model.loading import load_model
from supra.model.positions import check_positions

LENGTHS = {
    "induction": (30, 60, 120, 240),
    "associative-recall": (20, 40, 80, 160),
    "mqar": (64, 128, 256),
    "recent-recall": (60, 120, 240, 480, 960),
}
PAIRS = (4, 16)
SAMPLES = 256


@dataclass(frozen=True)
class LengthResult:
    """Shares of the answers."""

    length: int  # words per row, as the language counts them
    pairs: int | None  # pairs per row, in mqar
    vocabulary: int
    chance: float  # accuracy of guessing among the possible answers
    among_values: float  # the right word is the most likely of the possible answers
    exact: float  # it is the most likely of all tokens


@dataclass(frozen=True)
class TaskResult:
    model: str
    task: str
    samples: int  # rows per length
    seed: int
    results: list[LengthResult]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        lines = [
            f"{self.model} on {self.task}: accuracy among the possible answers, and among all "
            f"tokens; {self.samples} rows of each length",
            f"  {'length':>8}{'pairs':>8}{'among answers':>14}{'of all':>10}{'chance':>10}",
        ]
        for x in self.results:
            pairs = "" if x.pairs is None else x.pairs
            shares = f"{x.among_values:14.3f}{x.exact:10.3f}{x.chance:10.3f}"
            lines.append(f"  {x.length:8,d}{pairs:>8}{shares}")
        return lines


def evaluate_task(
    checkpoint: Checkpoint,
    task: str,
    *,
    lengths: Sequence[int] = (),
    pairs: Sequence[int] = (),
    vocabulary: int | None = None,
    samples: int = SAMPLES,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> TaskResult:
    """Accuracy of any causal language model on the language `task` of supra.data.synthetic.

    Words are single tokens of the model's vocabulary, drawn anew for every row, so the model can
    only learn their meaning from the row. Raises UserError for an unknown task, and when a row or
    the vocabulary is too small.
    """
    check_choice("task", task, LANGUAGES)
    if samples < 1:
        raise UserError(f"--samples (={samples}) must be at least 1")
    languages = plan_languages(task, lengths or LENGTHS[task], pairs, vocabulary)
    tokenizer = checkpoint.tokenizer()
    words = single_token_words(tokenizer, max(x.vocabulary for x in languages))
    start = start_tokens(tokenizer)
    rows = [  # before the model is loaded, so that mistakes are reported at once
        draw_examples(language, words, start, Random(f"{seed} {language}"), samples)
        for language in languages
    ]
    model = load_model(checkpoint, dtype)
    longest = max(len(row.ids) for some in rows for row in some)
    check_positions(model, f"--lengths: the longest row of {task}", longest)
    results = []
    for language, some in zip(
        tqdm(languages, unit="length", disable=not progress), rows, strict=True
    ):
        sizes = language.length, getattr(language, "pairs", None), language.vocabulary
        shares = recall_accuracy(model, some)
        results.append(LengthResult(*sizes, 1 / language.candidates, *shares))
    return TaskResult(checkpoint.name, task, samples, seed, results)


def plan_languages(
    task: str, lengths: Sequence[int], pairs: Sequence[int], vocabulary: int | None
) -> list[Language]:
    """The language `task` for every length, and, for mqar, every number of pairs.

    By default, mqar draws from twice as many words as a row has tokens, because few models have the
    published 8192 words as single tokens.
    """
    kind = LANGUAGES[task]
    if kind is MultiQueryRecall:
        return [
            kind(length, 2 * length if vocabulary is None else vocabulary, count)
            for length in lengths
            for count in pairs or PAIRS
        ]
    if pairs:
        raise UserError(f"--pairs is only for mqar, not for {task}: leave it out")
    sizes = {} if vocabulary is None else {"vocabulary": vocabulary}
    return [kind(length, **sizes) for length in lengths]
