"""What a model can recall from its context, by length and by number of things to remember.

Perplexity hides this: a low perplexity does not mean that the model uses its context.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from supra.data.packing import start_tokens
from supra.data.synthetic import Example, Language, MultiQueryRecall
from supra.errors import UserError
from supra.evaluate.tasks.prompts import (
    ANSWER_TOKENS,
    CANDIDATES,
    needle,
    single_token_words,
)
from supra.evaluate.tasks.scoring import BATCH_TOKENS, score_continuations
from supra.model.offload import device_of
from supra.model.positions import check_positions

LENGTHS = (256, 512, 1024, 2048)
DEPTHS = (0.1, 0.5, 0.9)
SAMPLES = 3  # per length and depth
PAIRS = (4, 16, 64)
QUERIES = 256  # per number of pairs


@dataclass(frozen=True)
class NeedleResult:
    """Shares of the samples."""

    length: int  # tokens of the prompt
    depth: float
    chosen: float  # the right number is the most likely candidate
    exact: float  # greedy decoding gives the right number


@dataclass(frozen=True)
class PairsResult:
    """Shares of the queries."""

    pairs: int
    among_values: float  # the right value is the most likely of the row's values
    exact: float  # it is the most likely of all tokens


@dataclass(frozen=True)
class Recall:
    needles: list[NeedleResult]
    pairs: list[PairsResult]

    def lines(self) -> list[str]:
        lines = [
            "recall: accuracy for a number in the text, by its depth, among "
            f"{CANDIDATES} numbers (chance {1 / CANDIDATES:.2f}) and in greedy decoding",
            f"  {'tokens':>8}" + "".join(f"{depth:>16}" for depth in DEPTHS),
        ]
        for length in dict.fromkeys(x.length for x in self.needles):
            cells = [f"{x.chosen:.2f} {x.exact:.2f}" for x in self.needles if x.length == length]
            lines.append(f"  {length:8,d}" + "".join(f"{cell:>16}" for cell in cells))
        lines.append("  pairs of words: accuracy among the values of a row, and among all tokens")
        for x in self.pairs:
            chance = f"(chance {1 / x.pairs:.2f})"
            lines.append(f"  {x.pairs:8d}{x.among_values:11.2f} {x.exact:.2f}  {chance}")
        return lines


def measure_recall(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    filler: Sequence[int],
    *,
    lengths: Sequence[int] = LENGTHS,
    pairs: Sequence[int] = PAIRS,
    seed: int = 0,
) -> Recall:
    """Recall of needles in `filler` (tokens), and associative recall of single-token words."""
    if not filler:
        raise UserError("recall needs text to hide numbers in, and this text is empty")
    check_positions(model, "--recall-lengths", max(lengths), ANSWER_TOKENS)
    needles = [
        _find_needles(model, tokenizer, filler, length, depth, Random(f"{seed} {length} {depth}"))
        for length in lengths
        for depth in DEPTHS
    ]
    words, start = single_token_words(tokenizer, 2 * max(pairs)), start_tokens(tokenizer)
    results = []
    for count in pairs:
        language = MultiQueryRecall(length=4 * count, vocabulary=2 * count, pairs=count)
        generator = Random(f"{seed} {count}")
        rows = draw_examples(language, words, start, generator, QUERIES // count)
        results.append(PairsResult(count, *recall_accuracy(model, rows)))
    return Recall(needles, results)


def _find_needles(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    filler: Sequence[int],
    length: int,
    depth: float,
    generator: Random,
) -> NeedleResult:
    needles = [needle(tokenizer, filler, length, depth, generator) for _ in range(SAMPLES)]
    scores = score_continuations(
        model, [x.prompt for x in needles], [x.candidates for x in needles]
    )
    answers = torch.tensor([x.answer for x in needles])
    chosen = (scores.log_likelihood.argmax(1) == answers).float().mean().item()
    exact = scores.greedy[torch.arange(len(needles)), answers].float().mean().item()
    return NeedleResult(length, depth, chosen, exact)


def draw_examples(
    language: Language, words: Sequence[int], start: Sequence[int], generator: Random, count: int
) -> list[Example]:
    """Random rows of a language, behind the tokens `start`.

    Every row draws its words anew, so that the frequency of a word does not matter. Raises
    UserError when there are fewer words than the language needs.
    """
    size = language.vocabulary
    if len(words) < size:
        raise UserError(
            f"{language.name} needs {size} words, but the tokenizer has {len(words)}: "
            "use shorter rows, or a smaller vocabulary"
        )
    return [
        language.example(generator.sample(words, size), generator).after(start)
        for _ in range(count)
    ]


def recall_accuracy(model: PreTrainedModel, rows: Sequence[Example]) -> tuple[float, float]:
    """The share of right answers: most likely among the row's values, and among all tokens.

    Rows have equal length.
    """
    return tuple(found.float().mean().item() for found in recall_hits(model, rows))


@torch.no_grad()
def recall_hits(
    model: PreTrainedModel, rows: Sequence[Example], batch_tokens: int = BATCH_TOKENS
) -> tuple[Tensor, Tensor]:
    """Whether each answer is the most likely of the row's values, and of all tokens.

    Two tensors, bool [N, Q], with the Q answers of a row in the order of its `queries`. Rows have
    equal length.
    """
    hits, device = [], device_of(model)
    size = max(1, batch_tokens // len(rows[0].ids))
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        ids = torch.tensor([row.ids for row in some], device=device)
        at = torch.tensor([row.queries for row in some], device=device)
        values = torch.tensor([row.values for row in some], device=device)
        logits = model(input_ids=ids, use_cache=False).logits
        answers = ids.gather(1, at + 1)
        logits = logits.take_along_dim(at[..., None], dim=1)  # [N, queries, V]
        places = logits.take_along_dim(values[:, None], dim=2).argmax(-1)
        found = values.gather(1, places) == answers, logits.argmax(-1) == answers
        hits.append([x.cpu() for x in found])
    return tuple(torch.cat(found) for found in zip(*hits, strict=True))
