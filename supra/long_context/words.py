"""Verdicts: which heads collapse, and from which token on; and whether the loss stays good."""

import math
from collections.abc import Sequence

# A norm above GROWN times the largest in training counts as out of bounds. Later layers have never
# seen such a state, and norms of different texts of the same length differ by less. In a small
# Mamba-2 whose accuracy falls by 24 points at 16 times the trained length, heads grow 2 to 9 times.
GROWN = 2.0
# A norm counts as level if it grows by at most this factor from the third to the last quarter of
# the tokens beyond the trained length. A sum that never forgets grows by 12 % or more if its terms
# are random, and by 26 % if they point in one direction. A state that has settled changes by a few
# percent with the text.
STILL = 1.05
# Heads that keep a larger share of the first token over the trained length were never trained to
# forget: at 0.9, half of it is left after seven trained lengths. Collapsed heads in the literature
# keep 0.997.
KEPT = 0.9
# The loss may be this many times the loss of the same tokens read from an empty state (0.15 nats
# more at a loss of 3). The absolute margin is for very easy text, such as many line ends.
LOSS, MIN_NATS = 1.05, 0.05

COLLAPSES, GREW, KEEPS, STABLE = "collapses", "grew", "keeps", "stable"
MEANING = {
    COLLAPSES: f"collapse (norm over {GROWN:g} times the largest in training, and still growing)",
    GREW: f"grew (norm over {GROWN:g} times the largest in training, but no longer growing)",
    KEEPS: f"do not forget (over {KEPT:g} of the first token is left after the trained length)",
}


def departure(values: Sequence[float], places: Sequence[int], threshold: float) -> int | None:
    """The first place from which on values lie above the threshold; None if there is none.

    Both the value at that place and the mean from there to the end must lie above it. A value that
    is not finite lies above.
    """
    total, found = 0.0, None
    for count, (value, place) in enumerate(zip(values[::-1], places[::-1], strict=True), start=1):
        value = value if math.isfinite(value) else math.inf
        total += value
        if value > threshold and total / count > threshold:
            found = place
    return found


def harm(loss: float, anew: float) -> float:
    """By how many nats the loss in the stream exceeds its limit; 0 or less if it is good."""
    return loss - max(LOSS * anew, anew + MIN_NATS)


def head_verdict(
    norms: Sequence[float], places: Sequence[int], largest: float, kept: float
) -> tuple[str, int | None]:
    """The verdict on a head, and the token after which its norm stays out of bounds.

    Args:
        norms: norms of its state beyond the trained length; at least four.
        places: the tokens at which they were taken.
        largest: the largest norm of its state within the trained length.
        kept: the share of the first token that is kept over the trained length.
    """
    quarter, end = len(norms) // 4, end_norm(norms)
    if end <= GROWN * largest:
        return (KEEPS, None) if kept > KEPT else (STABLE, None)
    settled = end <= STILL * end_norm(norms[:-quarter], quarter)
    return (GREW if settled else COLLAPSES), departure(norms, places, GROWN * largest)


def end_norm(norms: Sequence[float], count: int | None = None) -> float:
    """The mean of the last `count` norms, by default of the last quarter; a single norm varies too
    much with the text."""
    last = norms[-(count or len(norms) // 4) :]
    return sum(last) / len(last)
