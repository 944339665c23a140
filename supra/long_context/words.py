"""From numbers to words: which heads collapse and from where on, and whether the loss holds."""

import math
from collections.abc import Sequence

# A state twice as large as it ever was in training is nothing that its readers have seen, and
# norms of texts of one length differ by less. In a small Mamba-2 whose accuracy falls by 24 points,
# heads grew to 2 to 9 times (16 times the trained length).
GROWN = 2.0
# From the third quarter of what was read beyond the trained length to the last: sums that never
# forget grow by 12 % or more if what they add is random, by 26 % if it points one way; what has
# settled moves by some percent with the text.
STILL = 1.05
# Of the first token, over the trained length. What keeps 0.9 has half of it left after seven
# trained lengths: it was never trained to forget. Published of collapsed heads: 0.997.
KEPT = 0.9
# What loss may be beside that of the same tokens read from an empty state: 0.15 nats in 3. Where a
# text is so easy that it has next to none, as many line ends, its share would say nothing.
LOSS, LEAST_NATS = 1.05, 0.05

COLLAPSES, GREW, KEEPS, STABLE = "collapses", "grew", "keeps", "stable"
MEANING = {
    COLLAPSES: f"collapse (norm more than {GROWN:g} times the largest in training, and growing)",
    GREW: f"grew (norm more than {GROWN:g} times the largest in training, but level by now)",
    KEEPS: f"keep (over {KEPT:g} of the first token after the trained length, in bounds so far)",
}


def departure(values: Sequence[float], places: Sequence[int], threshold: float) -> int | None:
    """The first place from which on values lie above the threshold: it does, and the mean of all
    from there to the end. What is not finite does. None where there is no such place."""
    total, found = 0.0, None
    for count, (value, place) in enumerate(zip(values[::-1], places[::-1], strict=True), start=1):
        value = value if math.isfinite(value) else math.inf
        total += value
        if value > threshold and total / count > threshold:
            found = place
    return found


def harm(loss: float, anew: float) -> float:
    """By how many nats a loss is more than it may be; 0 or less where it holds."""
    return loss - max(LOSS * anew, anew + LEAST_NATS)


def head_verdict(
    norms: Sequence[float], places: Sequence[int], largest: float, kept: float
) -> tuple[str, int | None]:
    """What a head does and from which token on.

    Args:
        norms, places: of its state beyond the trained length; four at least.
        largest: norm of its state within the trained length.
        kept: of the first token over the trained length.
    """
    quarter, end = len(norms) // 4, end_norm(norms)
    if end <= GROWN * largest:
        return (KEEPS, None) if kept > KEPT else (STABLE, None)
    settled = end <= STILL * end_norm(norms[:-quarter], quarter)
    return (GREW if settled else COLLAPSES), departure(norms, places, GROWN * largest)


def end_norm(norms: Sequence[float], count: int | None = None) -> float:
    """The mean of the last ones, a quarter of them if nothing is said: one alone varies with the
    text."""
    last = norms[-(count or len(norms) // 4) :]
    return sum(last) / len(last)
