"""Prompts whose answers stand in the prompt and nowhere else.

A generator is a `random.Random`, so that a seed gives the same prompts on every machine.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from transformers import PreTrainedTokenizerBase

from supra.data.packing import continuation_tokens, plain_tokens, start_tokens
from supra.errors import UserError

CANDIDATES = 8
ANSWER_TOKENS = 8  # maximum length of an answer: five digits, a space, and some room
NAMES = ("castle", "garden", "harbor", "library", "market", "museum", "station", "temple")
_MIN_LETTERS = 4


@dataclass(frozen=True)
class Needle:
    """A prompt that ends in a question for a number, and the candidates for the answer."""

    prompt: list[int]  # token ids
    candidates: list[list[int]]  # token ids of each number
    answer: int  # index of the right candidate
    at: int  # position of the needle's first token in the prompt


def needle(
    tokenizer: PreTrainedTokenizerBase,
    filler: Sequence[int],
    length: int,
    depth: float,
    generator: Random,
) -> Needle:
    """A secret number in `filler`, asked for at the end of exactly `length` tokens.

    `depth` is 0 for a needle at the start and 1 for a needle right before the question. The filler
    begins at a random token and wraps around. This is RULER's form (arXiv 2404.06654) of "needle in
    a haystack" (Kamradt 2023). Raises UserError when `length` is too small for needle and question.
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
            f"recall length (={length}) must be at least {length - room}: needle and question have "
            "this many tokens"
        )
    first = generator.randrange(len(filler))
    hay = [filler[(first + index) % len(filler)] for index in range(room)]
    before = round(depth * room)
    prompt = [*start, *hay[:before], *statement, *hay[before:], *question]
    return Needle(prompt, candidates, answer, at=len(start) + before)


def single_token_words(tokenizer: PreTrainedTokenizerBase, minimum: int) -> list[int]:
    """Tokens that are a space and a word of four or more letters, common ones first.

    If the tokenizer has fewer than `minimum` such tokens: all tokens that are not special.
    """
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    words = [id for id, token in enumerate(tokens) if token and _is_word(token)]
    if len(words) >= minimum:
        return words
    special = set(tokenizer.all_special_ids)
    return [id for id, token in enumerate(tokens) if token and id not in special]


def _is_word(token: str) -> bool:
    word = token[1:]
    starts = token[0] in "Ġ▁"  # how byte-level and SentencePiece vocabularies write a space
    letters = word.isascii() and word.isalpha() and word.islower()
    return starts and letters and len(word) >= _MIN_LETTERS
