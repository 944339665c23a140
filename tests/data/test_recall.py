"""Texts rewritten for recall: what they are made of, and that all of it returns."""

import random
import re
from collections import Counter

import pytest

from supra.data.recall import BREAK, PAIRS, PASSAGE, PASSAGES, recall_text


def some_text(seed, words):
    draw = random.Random(seed)
    chosen = ("".join(draw.choices("abcdefgh", k=draw.randint(1, 6))) for _ in range(words))
    return "".join(word + draw.choice((" ", " ", " ", "\n", ". ")) for word in chosen)


@pytest.mark.parametrize("words", [1, 7, 300, 2001])
@pytest.mark.parametrize("seed", range(3))
def test_every_passage_and_every_list_returns(seed, words):
    """Passages of the text once or twice, lists twice; without lists and returns, the text."""
    text = some_text(seed, words)
    parts = recall_text(text).split(BREAK)
    lists = [part.splitlines() for part in parts if is_list(part)]
    assert sorted(map(sorted, lists[::2])) == sorted(map(sorted, lists[1::2]))
    counts = Counter(part for part in parts if not is_list(part))
    assert set(counts.values()) <= {1, 2, 3, 4}
    assert " ".join(counts).split() == text.split()
    assert all(len(part.split()) <= PASSAGE[1] for part in counts)
    if words > 1000:
        assert lists and max(counts.values()) > 1


def is_list(part):
    lines = part.splitlines()
    return len(lines) >= PAIRS[0] and all(re.fullmatch(r"\(?\w+\W{2,4}\w+\)?", x) for x in lines)


def test_a_list_has_other_words_in_every_place():
    parts = recall_text(some_text(5, 3000)).split(BREAK)
    for part in filter(is_list, parts):
        words = re.findall(r"\w+", part)
        assert len(words) == len(set(words)) <= 2 * PAIRS[1]


def test_lists_return_after_the_passages_that_follow_them():
    parts = recall_text(some_text(6, 3000)).split(BREAK)
    places = [place for place, part in enumerate(parts) if is_list(part)]
    for first, second in zip(places[::2], places[1::2], strict=True):
        assert sorted(parts[first].splitlines()) == sorted(parts[second].splitlines())
        assert 1 <= second - first - 1 <= PASSAGES[1]


def test_the_same_call_gives_the_same_text_and_another_epoch_another():
    text = some_text(7, 500)
    assert recall_text(text) == recall_text(text, 0)
    assert recall_text(text, 1) != recall_text(text, 0)


@pytest.mark.parametrize("text", ["", " \n "])
def test_blank_text_stays_blank(text):
    assert recall_text(text) == ""
