"""Prompts that can be answered from what they say and from nothing else; seeded.

A generator is a `random.Random`, so that a seed gives the same prompts on every machine.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from transformers import PreTrainedTokenizerBase

from supra.data.packing import plain_tokens, start_tokens
from supra.errors import UserError

CANDIDATES = 8
ANSWER_TOKENS = 8  # at most: five digits, a space, and room
NAMES = ("castle", "garden", "harbor", "library", "market", "museum", "station", "temple")
_LEAST_LETTERS = 4


@dataclass(frozen=True)
class Needle:
    """A prompt that ends in a question; candidates are the tokens of numbers, all of them ids."""

    prompt: list[int]
    candidates: list[list[int]]
    answer: int  # which candidate the text names
    at: int  # the needle's first token in the prompt


def continuation_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str, text: str) -> list[int]:
    """What the tokens of `prompt` go on with; alone, `text` may get another space before it."""
    return plain_tokens(tokenizer, prompt + text)[len(plain_tokens(tokenizer, prompt)) :]


def needle(
    tokenizer: PreTrainedTokenizerBase,
    filler: Sequence[int],
    length: int,
    depth: float,
    generator: Random,
) -> Needle:
    """A secret number in `filler`, asked for at the end of exactly `length` tokens.

    `depth` is 0 for a needle at the start and 1 for one right before the question. The filler
    begins anywhere and goes round. After "needle in a haystack" (Kamradt 2023), as RULER has it
    (arXiv 2404.06654). Raises UserError when `length` has no room for needle and question.
    """
    name = generator.choice(NAMES)
    numbers = [f" {number}" for number in generator.sample(range(10_000, 100_000), CANDIDATES)]
    answer = generator.randrange(CANDIDATES)
    asked = f"\nThe secret number of the {name} is"
    question = plain_tokens(tokenizer, asked)
    candidates = [continuation_tokens(tokenizer, asked, number) for number in numbers]
    statement = plain_tokens(tokenizer, f"{asked}{numbers[answer]}.\n")
    start = start_tokens(tokenizer)
    room = length - len(start) - len(statement) - len(question)
    if room < 0:
        raise UserError(
            f"recall length (={length}) must be at least {length - room}: needle and question "
            "take as many tokens"
        )
    first = generator.randrange(len(filler))
    hay = [filler[(first + index) % len(filler)] for index in range(room)]
    before = round(depth * room)
    prompt = [*start, *hay[:before], *statement, *hay[before:], *question]
    return Needle(prompt, candidates, answer, at=len(start) + before)


def single_token_words(tokenizer: PreTrainedTokenizerBase, least: int) -> list[int]:
    """Tokens that are a word of some letters with the space before it, common ones first.

    All tokens that are not special where the tokenizer has fewer such words than `least`.
    """
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    words = [id for id, token in enumerate(tokens) if token and _is_word(token)]
    if len(words) >= least:
        return words
    special = set(tokenizer.all_special_ids)
    return [id for id, token in enumerate(tokens) if token and id not in special]


def _is_word(token: str) -> bool:
    word = token[1:]
    starts = token[0] in "Ġ▁"  # a space, in byte-level and in SentencePiece vocabularies
    letters = word.isascii() and word.isalpha() and word.islower()
    return starts and letters and len(word) >= _LEAST_LETTERS
