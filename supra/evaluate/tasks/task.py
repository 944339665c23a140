"""`supra eval task`: how well a model answers rows of a synthetic language, by their length."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from random import Random
from typing import Any

import torch
from tqdm import tqdm

from supra.checkpoint.loading import load_model
from supra.checkpoint.opening import Checkpoint
from supra.data.packing import start_tokens
from supra.data.synthetic import LANGUAGES, Language, MultiQueryRecall
from supra.errors import UserError, check_choice
from supra.evaluate.tasks.prompts import single_token_words
from supra.evaluate.tasks.recall import draw_examples, recall_accuracy
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

    length: int  # words of a row, as its language counts them
    pairs: int | None  # of a row of mqar
    vocabulary: int
    chance: float  # of a guess among the values
    among_values: float  # the right word is the likeliest of those that could be the answer
    exact: float  # it is the likeliest of all tokens


@dataclass(frozen=True)
class TaskResult:
    model: str
    task: str
    samples: int  # rows of each length
    seed: int
    results: list[LengthResult]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        lines = [
            f"{self.model} on {self.task}: the answer is the likeliest of the words that could be "
            f"it, and of all tokens; {self.samples} rows of each length",
            f"  {'length':>8}{'pairs':>8}{'among words':>14}{'of all':>10}{'chance':>10}",
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

    Words are single tokens of the model's vocabulary, drawn anew for every row; nothing is learned
    but from the row. Raises UserError for an unknown task, and where a row or the vocabulary has no
    room.
    """
    check_choice("task", task, LANGUAGES)
    if samples < 1:
        raise UserError(f"--samples (={samples}) must be at least 1")
    languages = plan_languages(task, lengths or LENGTHS[task], pairs, vocabulary)
    tokenizer = checkpoint.tokenizer()
    words = single_token_words(tokenizer, max(x.vocabulary for x in languages))
    start = start_tokens(tokenizer)
    rows = [  # before the model is loaded: what has no room is said at once
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
    """The language `task` in every length, and of mqar with every number of pairs.

    Rows of mqar draw from twice as many words as they have tokens: few models have the published
    8192 words in single tokens.
    """
    kind = LANGUAGES[task]
    if kind is MultiQueryRecall:
        return [
            kind(length, 2 * length if vocabulary is None else vocabulary, count)
            for length in lengths
            for count in pairs or PAIRS
        ]
    if pairs:
        raise UserError(f"--pairs is for mqar: {task} has none, leave it out")
    sizes = {} if vocabulary is None else {"vocabulary": vocabulary}
    return [kind(length, **sizes) for length in lengths]
