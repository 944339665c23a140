"""One number about a model, and how much of a teacher's number a student keeps.

A measure holds the value of every item that it is the mean of. Student and teacher answer the same
items, so the standard error of what is kept comes from their differences item by item.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from typing import Any

ACCURACY, PERPLEXITY = "accuracy", "perplexity"
KEPT, WEAKENED, LOST, UNCLEAR = "kept", "weakened", "lost", "unclear"
WORDS = (KEPT, WEAKENED, LOST, UNCLEAR)
KEPT_FROM, LOST_BELOW = 0.9, 0.5
SURE = 2  # standard errors


@dataclass(frozen=True)
class Measure:
    """A weighted mean over items.

    part, name: which part of the suite it belongs to, and what it is called there.
    kind: of an accuracy, values are from 0 to 1; of a perplexity, nats per token, and the number is
        exp of their mean.
    values, weights: of every item.
    strata: the name of each item's stratum, such as its task; items of a stratum are neighbours.
        The standard error leaves out what strata differ by, because they were not drawn.
    chance: the accuracy of guessing.
    detail: whether it is part of another measure, which then speaks for it.
    """

    part: str
    name: str
    kind: str
    values: list[float]
    weights: list[float]
    strata: list[str]
    chance: float = 0.0
    detail: bool = False

    @property
    def title(self) -> str:
        """The part and the name."""
        return f"{self.part} {self.name}"

    @cached_property
    def value(self) -> float:
        mean = _mean(self.values, self.weights)
        return _exp(mean) if self.kind == PERPLEXITY else mean

    @cached_property
    def standard_error(self) -> float | None:
        """None if a stratum has a single item."""
        error = _standard_error(self.values, self.weights, self.strata)
        if error is None or self.kind == ACCURACY:
            return error
        return error * self.value

    def by_stratum(self) -> dict[str, float]:
        """The accuracy of each stratum."""
        rows = zip(self.strata, self.values, self.weights, strict=True)
        found = {}
        for name, items in groupby(rows, key=itemgetter(0)):
            _, values, weights = zip(*items, strict=True)
            found[name] = _mean(values, weights)
        return found

    def described(self) -> dict[str, Any]:
        """What is measured, for JSON."""
        names = "part", "name", "kind", "chance", "detail"
        return {name: getattr(self, name) for name in names} | {"items": len(self.values)}

    def numbers(self) -> dict[str, Any]:
        """What was found, for JSON."""
        found = {"value": self.value, "standard_error": self.standard_error}
        by_task = self.by_stratum() if len(set(self.strata)) > 1 else None
        return found if by_task is None else {**found, "by_task": by_task}


@dataclass(frozen=True)
class Comparison:
    """A student's measure beside its teacher's, over the same items."""

    teacher: Measure
    student: Measure

    @cached_property
    def kept(self) -> float | None:
        """Of an accuracy, the share of what the teacher has above chance. Of a perplexity, the
        teacher's divided by the student's: the share of the probability that the right token gets
        (geometric mean). None if the teacher is no better than chance."""
        if self.teacher.kind == PERPLEXITY:
            return _divide(self.teacher.value, self.student.value)
        return self._above_chance(self.student) if self._teacher_can else None

    @cached_property
    def standard_error(self) -> float | None:
        """Of `kept`, to first order in the differences of the items."""
        if self.kept is None:
            return None
        ours, theirs = self.student.values, self.teacher.values
        chance, kept = self.teacher.chance, self.kept
        if self.teacher.kind == PERPLEXITY:
            apart = [b - a for a, b in zip(ours, theirs, strict=True)]
            scale = kept
        else:
            pairs = zip(ours, theirs, strict=True)
            apart = [(a - chance) - kept * (b - chance) for a, b in pairs]
            scale = 1 / (self.teacher.value - chance)
        error = _standard_error(apart, self.teacher.weights, self.teacher.strata)
        return None if error is None else error * scale

    @property
    def word(self) -> str:
        """Kept from 90 %, lost below 50 %, weakened between. Unclear if the teacher is no better
        than chance, or if two standard errors are wider than from one border to the other."""
        if self.kept is None or self.standard_error is None:
            return UNCLEAR
        if SURE * self.standard_error > KEPT_FROM - LOST_BELOW:
            return UNCLEAR
        if self.kept >= KEPT_FROM:
            return KEPT
        return WEAKENED if self.kept >= LOST_BELOW else LOST

    def as_dict(self) -> dict[str, Any]:
        """Both numbers, what is kept, and the word for it."""
        return {
            **self.student.described(),
            "model": self.student.numbers(),
            "teacher": self.teacher.numbers(),
            "kept": self.kept,
            "kept_standard_error": self.standard_error,
            "word": self.word,
        }

    @property
    def _teacher_can(self) -> bool:
        above, error = self.teacher.value - self.teacher.chance, self.teacher.standard_error
        return above > (SURE * error if error is not None else 0)

    def _above_chance(self, measure: Measure) -> float:
        chance = self.teacher.chance
        return (measure.value - chance) / (self.teacher.value - chance)


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    products = (value * weight for value, weight in zip(values, weights, strict=True))
    return math.fsum(products) / math.fsum(weights)


def _standard_error(
    values: Sequence[float], weights: Sequence[float], strata: Sequence[str]
) -> float | None:
    """Of a weighted mean of independent items, strata by strata.

    With equal weights and one stratum this is the sample's deviation over the root of its size.
    """
    total, variance = math.fsum(weights), 0.0
    rows = zip(strata, values, weights, strict=True)
    for _, items in groupby(rows, key=itemgetter(0)):
        _, some, heavy = zip(*items, strict=True)
        if len(some) < 2:
            return None
        middle = _mean(some, heavy)
        squares = ((w * (x - middle)) ** 2 for x, w in zip(some, heavy, strict=True))
        variance += math.fsum(squares) * len(some) / (len(some) - 1)
    return math.sqrt(variance) / total


def _divide(one: float, other: float) -> float:
    return one / other if math.isfinite(one) else math.nan


def _exp(mean: float) -> float:
    return math.exp(mean) if mean < 709 else math.inf  # the largest exponent of a float64
