"""Means, standard errors and what is kept, against their formulas."""

import math
import statistics

import pytest
import torch

from supra.evaluate.suite.measure import (
    ACCURACY,
    KEPT,
    LOST,
    PERPLEXITY,
    UNCLEAR,
    WEAKENED,
    Comparison,
    Measure,
)


def accuracy(values, chance=0.0, strata=None):
    strata = strata or ["a"] * len(values)
    return Measure("part", "acc", ACCURACY, list(values), [1.0] * len(values), strata, chance)


def perplexity(values, weights):
    return Measure("part", "perplexity", PERPLEXITY, values, weights, ["a"] * len(values))


def test_an_accuracy_has_the_standard_error_of_a_mean():
    values = [0, 1, 1, 0, 1, 1, 1]
    found = accuracy(values)
    assert found.value == pytest.approx(5 / 7)
    assert found.standard_error == pytest.approx(statistics.stdev(values) / math.sqrt(7))
    assert accuracy([1.0]).standard_error is None


def test_a_perplexity_weighs_its_tokens():
    found = perplexity([1.0, 2.0, 4.0], [10.0, 30.0, 20.0])
    assert found.value == pytest.approx(math.exp((10 + 60 + 80) / 60))
    assert perplexity([800.0, 900.0], [1.0, 1.0]).value == math.inf


def test_differences_between_strata_are_no_error():
    found = accuracy([0.0, 0.0, 1.0, 1.0], strata=["a", "a", "b", "b"])
    assert (found.value, found.standard_error) == (0.5, 0.0)
    assert found.by_stratum() == {"a": 0.0, "b": 1.0}
    uneven = accuracy([0.0, 1.0, 1.0, 1.0], strata=["a", "a", "b", "b"])
    assert uneven.standard_error == pytest.approx(statistics.stdev([0, 1]) / math.sqrt(2) / 2)


def test_what_is_kept_counts_from_chance():
    teacher, student = accuracy([1, 1, 1, 0] * 50, 0.5), accuracy([1, 1, 1, 0, 1] * 40, 0.5)
    pair = Comparison(teacher, accuracy(([1, 0] * 100), 0.5))
    assert pair.kept == pytest.approx(0) and pair.word == LOST
    assert Comparison(teacher, student).kept == pytest.approx(1.2)
    assert Comparison(teacher, teacher).kept == 1 and Comparison(teacher, teacher).word == KEPT
    assert Comparison(teacher, teacher).standard_error == 0


def test_the_error_of_a_share_is_that_of_many_draws():
    """Student and teacher answer the same items, so their errors partly cancel."""
    draws = torch.Generator().manual_seed(0)
    shares, errors = [], []
    for _ in range(400):
        hard = torch.rand(200, generator=draws)
        theirs = (hard < 0.8).double()
        ours = (hard + 0.1 * torch.rand(200, generator=draws) < 0.7).double()
        pair = Comparison(accuracy(theirs.tolist(), 0.25), accuracy(ours.tolist(), 0.25))
        shares.append(pair.kept)
        errors.append(pair.standard_error)
    assert statistics.fmean(errors) == pytest.approx(statistics.stdev(shares), rel=0.15)


def test_a_ratio_of_perplexities_comes_from_the_differences():
    theirs, ours = [1.0, 2.0, 3.0], [1.1, 2.3, 3.2]
    pair = Comparison(perplexity(theirs, [1.0] * 3), perplexity(ours, [1.0] * 3))
    assert pair.kept == pytest.approx(math.exp(-0.2))
    spread = statistics.stdev([0.1, 0.3, 0.2]) / math.sqrt(3)
    assert pair.standard_error == pytest.approx(pair.kept * spread)
    assert pair.word == WEAKENED


@pytest.mark.parametrize(
    ("hits", "word"), [(40, KEPT), (37, KEPT), (35, WEAKENED), (21, WEAKENED), (19, LOST)]
)
def test_words_have_their_borders(hits, word):
    """The teacher knows 40 of 100."""
    pair = Comparison(accuracy([1] * 40 + [0] * 60), accuracy([1] * hits + [0] * (100 - hits)))
    assert pair.word == word


def test_what_cannot_be_told_is_unclear():
    guessing = accuracy([1, 0] * 50, 0.5)
    assert Comparison(guessing, guessing).kept is None
    assert Comparison(guessing, guessing).word == UNCLEAR
    assert Comparison(accuracy([0, 0, 0]), accuracy([0, 0, 0])).word == UNCLEAR, "nor does it know"
    few = Comparison(accuracy([1, 1, 1, 0]), accuracy([1, 0, 0, 1]))
    assert few.kept is not None and few.word == UNCLEAR
    assert Comparison(accuracy([1.0]), accuracy([1.0])).word == UNCLEAR
