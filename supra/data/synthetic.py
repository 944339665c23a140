"""The synthetic languages on which H3 was designed, and two of many questions; seeded.

    induction             f b ⇒ c a d b ⇒                      c
    associative recall    a 1 c 3 a 1 b 3 ⇒ c                  3
    multi-query recall    a 1 b 3 c 2  b 3 f 4 a 1 c 2         3, 1 and 2 in their places
    recent recall         ! a 1 ! b 3 ? a 1 ! c 2 ? b 3        1 and 3 in their places

Every answer stands in the row, and nowhere else. Words are whatever tokens the caller has: the
first of them are keys and the last the marks, so a model in training sees each in one role only. A
generator is a `random.Random`, so that a seed gives the same rows on every machine.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import ClassVar

import torch
from torch import Tensor

from supra.data.packing import IGNORE
from supra.errors import UserError

MARKS = 2  # of H3's languages: "⇒", and "." for a key that is not there, which none of our rows has
QUERY_POWER = -0.99  # of the distance from the pairs to a query, in steps of two tokens


@dataclass(frozen=True)
class Example:
    """A row that answers itself, so that it is also text to train on."""

    ids: list[int]
    queries: list[int]  # places before the answers
    values: list[int]  # what could be an answer; as many in every row of a language

    def after(self, start: Sequence[int]) -> "Example":
        """The same behind other tokens."""
        return Example([*start, *self.ids], [len(start) + x for x in self.queries], self.values)


@dataclass(frozen=True)
class Induction:
    """The word that followed the mark when it came before (Fu et al. 2022, arXiv 2212.14052).

    `length` random words with the mark in the place of one, the mark again, and the answer. In the
    paper 30 words of a vocabulary of 20, of which two are marks.
    """

    name: ClassVar[str] = "induction"
    length: int = 30
    vocabulary: int = 20

    def __post_init__(self):
        _check("length", self.length, 3, "one word must lie between the mark and its return")
        _check("vocabulary", self.vocabulary, 2 + MARKS, "two words and two marks")

    @property
    def candidates(self) -> int:
        """Among how many words one guesses; the paper's 5% is a guess among the marks too."""
        return self.vocabulary - MARKS

    def example(self, words: Sequence[int], generator: Random) -> Example:
        """A row of these words; the last two are the marks."""
        *plain, mark, _ = words
        row = generator.choices(plain, k=self.length)
        place = generator.randrange(self.length - 2)
        row[place] = mark
        return Example([*row, mark, row[place + 1]], [self.length], plain)


@dataclass(frozen=True)
class AssociativeRecall:
    """The value of a key that came before (Fu et al. 2022, arXiv 2212.14052).

    Each row draws a value for every key, values may repeat; then `length` words of keys with their
    values, keys may repeat; then the mark, one of those keys, and its value. In the paper 20 words
    of a vocabulary of 10, which are 4 keys, 4 values and 2 marks; or 40 of 20.
    """

    name: ClassVar[str] = "associative-recall"
    length: int = 20
    vocabulary: int = 10

    def __post_init__(self):
        _check("length", self.length, 2, "one key and its value")
        _check("vocabulary", self.vocabulary, 4 + MARKS, "two keys, two values and two marks")
        _check_even("length", self.length, "keys and values come in turn")

    @property
    def candidates(self) -> int:
        """Values of the language, 4 in the paper: a guess is right in 25%."""
        return self.vocabulary - MARKS - self._keys

    @property
    def _keys(self) -> int:
        return (self.vocabulary - MARKS) // 2

    def example(self, words: Sequence[int], generator: Random) -> Example:
        """A row of these words; the last two are the marks."""
        *plain, mark, _ = words
        keys, values = plain[: self._keys], plain[self._keys :]
        value_of = dict(zip(keys, generator.choices(values, k=len(keys)), strict=True))
        shown = generator.choices(keys, k=self.length // 2)
        asked = generator.choice(sorted(set(shown)))
        row = [word for key in shown for word in (key, value_of[key])]
        return Example([*row, mark, asked, value_of[asked]], [self.length + 1], values)


@dataclass(frozen=True)
class MultiQueryRecall:
    """Several keys asked for in one row (Arora et al. 2023, arXiv 2312.04927).

    `pairs` keys with their values, no word twice; in the rest of the `length` tokens every key
    comes again, near the pairs more often than far from them (the gap's power is −0.99), and all
    else are words that are no key of the row. The answer follows its key, where Arora et al. put a
    random word and score the value in its place: so a row is text that a language model can go on
    with. They take a vocabulary of 8192, 4 pairs in 64 tokens to 64 pairs in 512.
    """

    name: ClassVar[str] = "mqar"
    length: int = 64
    vocabulary: int = 8192
    pairs: int = 4

    def __post_init__(self):
        _check("pairs", self.pairs, 1, "something must be asked for")
        _check("length", self.length, 4 * self.pairs, f"{self.pairs} pairs come twice")
        _check("vocabulary", self.vocabulary, 2 * self.pairs, f"{self.pairs} pairs of words")
        _check_even("length", self.length, "keys and values come in turn")

    @property
    def candidates(self) -> int:
        """Values of one row."""
        return self.pairs

    def example(self, words: Sequence[int], generator: Random) -> Example:
        """A row of these words: the first half are keys, the others values."""
        half = len(words) // 2
        keys = generator.sample(words[:half], self.pairs)
        values = generator.sample(words[half:], self.pairs)
        items = list(zip(keys, values, strict=True))
        context = 2 * self.pairs
        # a race of exponential clocks: the first to ring are a draw by weight, none twice
        rings = [
            generator.expovariate((gap + 1) ** QUERY_POWER)
            for gap in range((self.length - context) // 2)
        ]
        gaps = sorted(range(len(rings)), key=rings.__getitem__)[: self.pairs]
        ids = [word for item in items for word in item]
        while len(ids) < self.length:
            if (word := generator.choice(words)) not in keys:
                ids.append(word)
        queries = [context + 2 * gap for gap in gaps]
        for at, item in zip(queries, generator.sample(items, self.pairs), strict=True):
            ids[at : at + 2] = item
        return Example(ids, queries, values)


@dataclass(frozen=True)
class RecentRecall:
    """A stream of writes and questions about the last of them, to see whether a model forgets.

    `length` words in threes: the mark of a write, a key and its new value; or the mark of a
    question, one of the `recent` keys written last, and its value. The first is a write, of all
    half are questions. Writes go round all keys in an order of the row's own, so that no key gets
    a second value before all have one: a row of so few writes, as 60 words of 24 keys, can be
    answered without forgetting anything, and in longer ones every key is bound over and over.
    """

    name: ClassVar[str] = "recent-recall"
    length: int = 60
    vocabulary: int = 50
    recent: int = 8

    def __post_init__(self):
        _check("length", self.length, 6, "a write and a question")
        if self.length % 3:
            raise UserError(
                f"length (={self.length}) must be a multiple of 3: a mark, a key and a value"
            )
        _check("recent", self.recent, 1, "something must be asked for")
        keys = max(2, self.recent)
        reason = f"{keys} keys, as many values and two marks"
        _check("vocabulary", self.vocabulary, 2 * keys + MARKS, reason)

    @property
    def candidates(self) -> int:
        """Values of the language."""
        return self.vocabulary - MARKS - self._keys

    @property
    def _keys(self) -> int:
        return (self.vocabulary - MARKS) // 2

    def example(self, words: Sequence[int], generator: Random) -> Example:
        """A row of these words; the last two are the marks."""
        *plain, write, ask = words
        keys, values = plain[: self._keys], plain[self._keys :]
        operations = self.length // 3
        questions = operations // 2
        marks = [ask] * questions + [write] * (operations - questions - 1)
        generator.shuffle(marks)
        order = generator.sample(keys, len(keys))
        written, ids = [], []
        for mark in [write, *marks]:
            if mark == write:
                key = order[len(written) % len(order)]
                written.append((key, generator.choice(values)))
                ids += [mark, *written[-1]]
            else:
                ids += [mark, *generator.choice(written[-self.recent :])]
        queries = [at + 1 for at in range(0, self.length, 3) if ids[at] == ask]
        return Example(ids, queries, values)


Language = Induction | AssociativeRecall | MultiQueryRecall | RecentRecall
LANGUAGES: dict[str, type[Language]] = {
    language.name: language
    for language in (Induction, AssociativeRecall, MultiQueryRecall, RecentRecall)
}


def draw(language: Language, generator: Random, count: int) -> list[Example]:
    """Rows in the words 0, 1, … of a vocabulary that is the language's own."""
    words = range(language.vocabulary)
    return [language.example(words, generator) for _ in range(count)]


def labelled(examples: Sequence[Example], every_token: bool = False) -> tuple[Tensor, Tensor]:
    """Tokens and labels of rows of equal length, int64 [N, T].

    Labels stand where their token stands, as transformers has it, and are −100 but at the answers,
    or with `every_token` nowhere.
    """
    ids = torch.tensor([example.ids for example in examples])
    if every_token:
        return ids, ids.clone()
    answers = torch.tensor([example.queries for example in examples]) + 1
    return ids, torch.full_like(ids, IGNORE).scatter(1, answers, ids.gather(1, answers))


def _check(name: str, value: int, least: int, reason: str) -> None:
    if value < least:
        raise UserError(f"{name} (={value}) must be at least {least}: {reason}")


def _check_even(name: str, value: int, reason: str) -> None:
    if value % 2:
        raise UserError(f"{name} (={value}) must be even: {reason}")
