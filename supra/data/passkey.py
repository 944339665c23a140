"""Texts that hide a number, the passkey, and ask for it at their end: to evaluate and to train on.

The task is by Mohtashami & Jaggi 2023 (arXiv 2305.16300), the words by Stuffed Mamba (Chen et al.
2024, arXiv 2410.07145). A generator is a `random.Random`, so that a seed gives the same texts on
every machine.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from transformers import PreTrainedTokenizerBase

from supra.data.packing import (
    IGNORE,
    Document,
    continuation_tokens,
    end_tokens,
    plain_tokens,
    start_tokens,
)
from supra.errors import UserError

DIGITS = 5
PREFIX = (
    "There is an important info hidden inside a lot of irrelevant text. "
    "Find it and memorize it.\n\n"
)
FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
)
STATEMENT = "The passkey{n} is {key}. Remember it. {key} is the passkey{n}.\n"
QUESTION = "\nWhat is the pass key{n}? The passkey{n} is"


@dataclass(frozen=True)
class Passkey:
    """A prompt that ends in the question for one of the passkeys in it."""

    prompt: list[int]
    depth: float
    key: str  # the passkey that is asked for, five digits
    answer: list[int]  # its tokens, as they follow the prompt


def passkey_document(
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    generator: Random,
    keys: int = 1,
    setting: str = "length",
) -> Document:
    """A prompt and its answer, to train on: exactly `length` tokens with start and end tokens.

    The depth is random. Only the answer and the end tokens have labels. Raises UserError when
    `length` is too small; the message calls it `setting`.
    """
    start, end = start_tokens(tokenizer), end_tokens(tokenizer)
    depth = generator.random()
    found = passkey(tokenizer, length, depth, generator, keys, end=end, setting=setting)
    prompt, said = found.prompt[len(start) :], [*found.answer, *end]
    return Document([*prompt, *said], [*[IGNORE] * len(prompt), *said], start)


def passkey(
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    depth: float,
    generator: Random,
    keys: int = 1,
    *,
    end: Sequence[int] | None = None,
    setting: str = "--lengths",
) -> Passkey:
    """A prompt of exactly `length` tokens, including the start tokens. With `end`, the length
    includes the answer and these tokens as well.

    The text has n blocks; block int(depth · (n − 1)) states the key that is asked for. With several
    keys, each has a number, and the others stand in random other blocks. Surplus tokens are cut
    from the beginning of the first filler block. Raises UserError when `length` is too small.
    """
    drawn = [f"{key:0{DIGITS}d}" for key in generator.sample(range(10**DIGITS), keys)]
    numbers = [f" #{n + 1}" for n in range(keys)] if keys > 1 else [""]
    statements = [STATEMENT.format(n=n, key=key) for n, key in zip(numbers, drawn, strict=True)]
    asked, places = generator.randrange(keys), generator.random()
    question = QUESTION.format(n=numbers[asked])
    answer = continuation_tokens(tokenizer, question, f" {drawn[asked]}")

    def text_of(count: int) -> list[str]:
        return [PREFIX, *_blocks(statements, asked, depth, count, places), question]

    def tokens_of(*text: str) -> list[int]:
        return plain_tokens(tokenizer, "".join(text))

    start, minimum = start_tokens(tokenizer), len(tokens_of(*text_of(keys)))
    reserved = len(start) + (0 if end is None else len(answer) + len(end))
    room = length - reserved
    if room < minimum:
        raise UserError(
            f"{setting} (={length}) must be at least {reserved + minimum}: the passkeys and the "
            "question have this many tokens"
        )
    count = keys + (room - minimum) // (len(tokens_of(FILLER, FILLER)) - len(tokens_of(FILLER)))
    while len(ids := tokens_of(*text_of(count))) < room:
        count += 1
    if surplus := len(ids) - room:
        text = text_of(count)
        cut = len(tokens_of(*text[: text.index(FILLER)]))
        del ids[cut : cut + surplus]
    return Passkey([*start, *ids], depth, drawn[asked], answer)


def _blocks(
    statements: Sequence[str], asked: int, depth: float, count: int, places: float
) -> list[str]:
    """`count` blocks of text: the statements, and filler. `places` is the seed of the places of
    those statements that are not asked for."""
    at = int(depth * (count - 1))
    blocks = [FILLER] * (count - 1)
    others = [*statements[:asked], *statements[asked + 1 :]]
    free = Random(places).sample(range(count - 1), len(others))
    for place, other in zip(free, others, strict=True):
        blocks[place] = other
    return [*blocks[:at], statements[asked], *blocks[at:]]
