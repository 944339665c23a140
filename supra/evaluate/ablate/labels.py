"""Whether a model that answers A, B, C or D reads the choices or prefers a letter.

Converted models often answer with the same letter whatever it stands for, and accuracy alone hides
this. Therefore every question is asked four times, with its choices rotated.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from supra.data.packing import plain_tokens, start_tokens
from supra.errors import UserError
from supra.evaluate.tasks.prompts import continuation_tokens
from supra.evaluate.tasks.scoring import score_continuations

LETTERS = "ABCD"
QUESTIONS = 40
_SENTENCE = re.compile(r"[A-Z][^.!?:;\n]*(?:\n[^.!?:;\n]+)*(?<=[a-z]{3})\.(?=\s|$)")
_WORDS = range(8, 41)  # allowed numbers of words in a sentence


@dataclass(frozen=True)
class Question:
    """A sentence without its last word; the first choice is right."""

    sentence: str
    choices: tuple[str, ...]

    def prompt(self, shift: int) -> str:
        """The question with rotated choices: letter n stands for choice (n + shift) % 4."""
        listed = [
            f"{letter}. {self.choices[(n + shift) % len(LETTERS)]}"
            for n, letter in enumerate(LETTERS)
        ]
        lines = ["Which word completes the sentence?", "", f"{self.sentence} ____", *listed]
        return "\n".join([*lines, "Answer:"])


@dataclass(frozen=True)
class Labels:
    """Chance is 0.25 for both accuracies and 1/64 for consistency."""

    questions: int
    accuracy: float  # over questions and orders
    letters: dict[str, float]  # each letter's share of the answers
    consistency: float  # share of questions whose four answers all mean the same word
    cloze_accuracy: float  # without letters: the right word is the most likely of the four

    def lines(self) -> list[str]:
        shares = ", ".join(f"{letter} {share:.2f}" for letter, share in self.letters.items())
        return [
            f"labels: {self.questions} questions in {len(LETTERS)} orders",
            f"  right {self.accuracy:.2f}, the same word in all orders {self.consistency:.2f}, "
            f"answers {shares}",
            f"  right by the likelihood of the word, without letters: {self.cloze_accuracy:.2f}",
        ]


def build_questions(
    documents: Iterable[str], seed: int = 0, count: int = QUESTIONS
) -> list[Question]:
    """Questions from sentences of the text. The wrong choices are last words of other sentences.

    Raises UserError when the text has fewer than four sentences with different last words.
    """
    found = {}
    for document in documents:
        for sentence in _SENTENCE.findall(document):
            words = sentence.removesuffix(".").split()
            if len(words) in _WORDS and words[-1].isalpha() and words[-1].islower():
                found.setdefault(words[-1], " ".join(words[:-1]))
    if len(found) < len(LETTERS):
        raise UserError(
            f"questions need {len(LETTERS)} sentences with different last words, but the text has "
            f"{len(found)}: give a longer text"
        )
    generator, words = Random(seed), list(found)
    return [
        Question(
            found[word],
            (word, *generator.sample([x for x in words if x != word], len(LETTERS) - 1)),
        )
        for word in generator.sample(words, min(count, len(words)))
    ]


def measure_labels(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]
) -> Labels:
    """Ask the questions. The answer is the letter, or word, with the highest likelihood."""
    start, orders = start_tokens(tokenizer), len(LETTERS)
    letters = [continuation_tokens(tokenizer, "Answer:", f" {letter}") for letter in LETTERS]
    prompts = [
        start + plain_tokens(tokenizer, question.prompt(shift))
        for question in questions
        for shift in range(orders)
    ]
    scores = score_continuations(model, prompts, [letters] * len(prompts)).log_likelihood
    answers = scores.argmax(1).view(-1, orders)  # [questions, orders]
    chosen = (answers + torch.arange(orders)) % orders  # the choice that the letter stood for
    cloze = score_continuations(
        model,
        [start + plain_tokens(tokenizer, question.sentence) for question in questions],
        [
            [continuation_tokens(tokenizer, x.sentence, f" {word}") for word in x.choices]
            for x in questions
        ],
    ).log_likelihood.argmax(1)
    return Labels(
        questions=len(questions),
        accuracy=(chosen == 0).float().mean().item(),
        letters={x: (answers == n).float().mean().item() for n, x in enumerate(LETTERS)},
        consistency=(chosen == chosen[:, :1]).all(1).float().mean().item(),
        cloze_accuracy=(cloze == 0).float().mean().item(),
    )
