"""Synthetic languages for testing recall: the two that H3 was designed on, and two with many
questions per row.

    language              row                                  answers
    induction             f b ⇒ c a d b ⇒                      c
    associative recall    a 1 c 3 a 1 b 3 ⇒ c                  3
    multi-query recall    a 1 b 3 c 2  b 3 f 4 a 1 c 2         3, 1 and 2, each after its key
    recent recall         ! a 1 ! b 3 ? a 1 ! c 2 ? b 3        1 and 3, each after its key

Every answer can be read from the row, and only from there. The caller supplies the words, which may
be any tokens. The first words are keys and the last are marks, so that a model in training sees
each word in one role only. A generator is a `random.Random`, so that a seed gives the same rows on
every machine.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import ClassVar

import torch
from torch import Tensor

from supra.data.packing import IGNORE
from supra.errors import UserError

MARKS = 2  # in H3's languages: "⇒", and "." for a missing key, which does not occur here
# P(gap) ~ (gap + 1) ** QUERY_POWER; the gap from the pairs to a query, in steps of two tokens
QUERY_POWER = -0.99


@dataclass(frozen=True)
class Example:
    """A row that contains its answers, so that it is also text to train on."""

    ids: list[int]
    queries: list[int]  # positions of the tokens before the answers
    values: list[int]  # the possible answers; equally many in every row of a language

    def after(self, start: Sequence[int]) -> "Example":
        """The same example behind the tokens `start`."""
        return Example([*start, *self.ids], [len(start) + x for x in self.queries], self.values)


@dataclass(frozen=True)
class Induction:
    """Recall the word that followed the mark's first occurrence (Fu et al. 2022, arXiv 2212.14052).

    A row has `length` random words, one of them replaced by the mark; then the mark again, and the
    answer. The paper uses 30 words from a vocabulary of 18 words and 2 marks.
    """

    name: ClassVar[str] = "induction"
    length: int = 30
    vocabulary: int = 20

    def __post_init__(self):
        _check("length", self.length, 3, "one word must lie between the two marks")
        _check("vocabulary", self.vocabulary, 2 + MARKS, "it needs two words and two marks")

    @property
    def candidates(self) -> int:
        """The number of words that a guess chooses from. The paper's 5% includes the marks."""
        return self.vocabulary - MARKS

    def example(self, words: Sequence[int], generator: Random) -> Example:
        """A row of these words; the last two are the marks."""
        *plain, mark, _ = words
        row = generator.choices(plain, k=self.length)
        place = generator.randrange(self.length - 2)
        row[place] = mark
        return Example([*row, mark, row[place + 1]], [self.length], plain)


class _KeysAndValues:
    """A language whose words are half keys and half values, and two marks."""

    vocabulary: int

    @property
    def candidates(self) -> int:
        """The number of values, among which a guess chooses."""
        return self.vocabulary - MARKS - self._keys

    @property
    def _keys(self) -> int:
        return (self.vocabulary - MARKS) // 2


@dataclass(frozen=True)
class AssociativeRecall(_KeysAndValues):
    """Recall the value of a key that occurred before (Fu et al. 2022, arXiv 2212.14052).

    Each row draws a value for every key; several keys may have the same value. A row has `length`
    words, which are keys and their values in turn, and keys may repeat; then the mark, one of these
    keys, and its value. The paper uses 20 words from a vocabulary of 10 (4 keys, 4 values and 2
    marks), or 40 words from a vocabulary of 20.
    """

    name: ClassVar[str] = "associative-recall"
    length: int = 20
    vocabulary: int = 10

    def __post_init__(self):
        _check("length", self.length, 2, "one key and its value")
        _check("vocabulary", self.vocabulary, 4 + MARKS, "two keys, two values and two marks")
        _check_even("length", self.length, "keys and values alternate")

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
    """Recall the values of several keys in one row (Arora et al. 2023, arXiv 2312.04927).

    A row of `length` tokens begins with `pairs` keys and their values, and no word occurs twice
    there. Every key returns later in the row, more often close to the pairs than far from them (see
    QUERY_POWER). The remaining tokens are words that are not keys of this row. Here the value
    follows its key, so that a row is text that a language model can continue. Arora et al. put a
    random word there and score the value in its place. They use a vocabulary of 8192 and from 4
    pairs in 64 tokens to 64 pairs in 512.
    """

    name: ClassVar[str] = "mqar"
    length: int = 64
    vocabulary: int = 8192
    pairs: int = 4

    def __post_init__(self):
        _check("pairs", self.pairs, 1, "something must be asked for")
        _check(
            "length", self.length, 4 * self.pairs, f"each of the {self.pairs} pairs occurs twice"
        )
        _check("vocabulary", self.vocabulary, 2 * self.pairs, f"{self.pairs} pairs of words")
        _check_even("length", self.length, "keys and values alternate")

    @property
    def candidates(self) -> int:
        """The number of values in one row."""
        return self.pairs

    def example(self, words: Sequence[int], generator: Random) -> Example:
        """A row of these words: the first half are keys, the others values."""
        half = len(words) // 2
        keys = generator.sample(words[:half], self.pairs)
        values = generator.sample(words[half:], self.pairs)
        items = list(zip(keys, values, strict=True))
        context = 2 * self.pairs
        # Weighted sampling without replacement: each gap draws an exponential arrival time with its
        # weight as the rate, and the earliest arrivals are taken.
        arrivals = [
            generator.expovariate((gap + 1) ** QUERY_POWER)
            for gap in range((self.length - context) // 2)
        ]
        gaps = sorted(range(len(arrivals)), key=arrivals.__getitem__)[: self.pairs]
        ids = [word for item in items for word in item]
        while len(ids) < self.length:
            if (word := generator.choice(words)) not in keys:
                ids.append(word)
        queries = [context + 2 * gap for gap in gaps]
        for at, item in zip(queries, generator.sample(items, self.pairs), strict=True):
            ids[at : at + 2] = item
        return Example(ids, queries, values)


@dataclass(frozen=True)
class RecentRecall(_KeysAndValues):
    """A stream of writes and questions about recent writes, which tests whether a model forgets.

    The `length` words of a row come in threes: the mark of a write, a key and its new value; or the
    mark of a question, one of the `recent` keys written last, and its value. The first operation is
    a write, and half of all operations are questions. Each row writes its keys in a random order,
    again and again, so that no key gets a second value before every key has one. A short row, such
    as 60 words with 24 keys, can therefore be answered without forgetting anything. In longer rows
    every key is overwritten many times.
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
    """Random rows whose words are the tokens 0, 1, …, vocabulary − 1."""
    words = range(language.vocabulary)
    return [language.example(words, generator) for _ in range(count)]


def labelled(examples: Sequence[Example], every_token: bool = False) -> tuple[Tensor, Tensor]:
    """Tokens and labels of rows of equal length, int64 [N, T].

    A label has the position of its own token, as in transformers. Only the answers have labels, the
    rest is −100; with `every_token`, every token has a label.
    """
    ids = torch.tensor([example.ids for example in examples])
    if every_token:
        return ids, ids.clone()
    answers = torch.tensor([example.queries for example in examples]) + 1
    return ids, torch.full_like(ids, IGNORE).scatter(1, answers, ids.gather(1, answers))


def _check(name: str, value: int, minimum: int, reason: str) -> None:
    if value < minimum:
        raise UserError(f"{name} (={value}) must be at least {minimum}: {reason}")


def _check_even(name: str, value: int, reason: str) -> None:
    if value % 2:
        raise UserError(f"{name} (={value}) must be even: {reason}")
