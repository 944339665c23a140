"""Texts rewritten so that they practise recall.

Ordinary text seldom asks for recall: the last few words predict most others. In a rewritten text,
passages return in another order. So do lists of keys and values, which are words of the text; they
return after the passages that follow them. Only a model that finds the first copy can predict the
second, as induction heads do (Olsson et al. 2022, arXiv 2209.11895).
"""

import re
from collections.abc import Iterator
from random import Random

PASSAGE = (8, 64)  # words of a passage, at least and at most
PASSAGES = (1, 4)  # that return together
PAIRS = (4, 24)  # of a key and a value in a list
LINES = ("{}: {}", "{} = {}", "{} -> {}", "({}, {})")  # a list has one of these forms
BREAK = "\n\n"


def recall_text(text: str, epoch: int = 0) -> str:
    """The text with passages and lists that return, about twice as long.

    epoch: other epochs draw other lengths, orders and pairs. The same call gives the same text.
    """
    draw = Random(f"{epoch} {text}")
    passages = list(_passages(text, draw))
    vocabulary = sorted(set(re.findall(r"\w+", text)))
    parts, at = [], 0
    while at < len(passages):
        taken = draw.randint(*PASSAGES)
        some = passages[at : at + taken]
        at += taken
        if draw.random() < 0.5 and len(vocabulary) >= 2 * PAIRS[0]:
            lines = _pair_lines(vocabulary, draw)
            parts += ["\n".join(lines), *some, "\n".join(draw.sample(lines, len(lines)))]
        else:
            parts += [*some, *draw.sample(some, len(some))]
    return BREAK.join(parts)


def _passages(text: str, draw: Random) -> Iterator[str]:
    """The text in passages of some words, with the white space inside of them."""
    words = re.findall(r"\S+\s*", text)
    while words:
        count = draw.randint(*PASSAGE)
        yield "".join(words[:count]).rstrip()
        words = words[count:]


def _pair_lines(vocabulary: list[str], draw: Random) -> list[str]:
    """Lines with a key and a value each; no key occurs twice."""
    count = draw.randint(PAIRS[0], min(PAIRS[1], len(vocabulary) // 2))
    line, words = draw.choice(LINES), draw.sample(vocabulary, 2 * count)
    return [line.format(key, value) for key, value in zip(words[::2], words[1::2], strict=True)]
