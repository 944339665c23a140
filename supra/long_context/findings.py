"""The results of `supra diagnose`: as numbers, as JSON and as lines of text."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from supra.long_context.cures import Fix
from supra.long_context.stream import Bucket
from supra.long_context.words import COLLAPSES, GREW, KEEPS, MEANING

WORST = 10  # heads in the terminal's table
NAMED = 12  # maximum number of heads that a sentence names


@dataclass(frozen=True)
class Span:
    """Mean nats of the tokens `start` to `end` - 1, read in two ways: in the stream (`loss`), and
    after an empty state half a trained length before them (`anew`)."""

    start: int
    end: int
    loss: float
    anew: float


@dataclass(frozen=True)
class Losses:
    """Losses in nats per token. A position is the number of tokens read before."""

    inside: float  # the first trained length of the stream
    beyond: float  # everything after it
    beyond_four: float | None  # everything after four trained lengths
    excess: float  # of the spans beyond the trained length: loss in the stream minus loss anew
    ratio: float  # the same as a quotient
    falls_apart_from: (
        int | None
    )  # the excess is harmful from this token to the end, see `departure`
    spans: list[Span]
    by_position: list[Bucket]  # buckets that double in size
    fine: list[Bucket]  # buckets of equal size


@dataclass(frozen=True)
class Head:
    """One head. Its decay is over the trained length, as a mean over texts; `largest_norm` is the
    maximum over texts."""

    layer: int
    head: int
    mixer: str
    log_decay: float  # log of the product of decays; the mean over channels with own decays
    log_decay_slowest: float  # the same for the channel that decays least
    kept: float  # share of the first token that remains in that channel
    half_life: float  # tokens, at the mean rate
    largest_norm: float  # of the state within the trained length
    growth: float  # norm at the end, divided by largest_norm
    verdict: str  # one of those in supra.long_context.words
    since: int | None  # the norm is out of bounds from this token to the end
    statistics: dict[str, list[float]]  # one value per probe


@dataclass(frozen=True)
class Remembrance:
    """Effective remembrance, by the token at which reading starts: the mean over `places`
    predictions in `texts` texts."""

    length: int
    texts: int
    places: int
    by_start: list[tuple[int, float]]


@dataclass(frozen=True)
class Diagnosis:
    """All results of `supra diagnose`."""

    model: str
    text: str
    tokens: int
    restarts: int  # how often the text began again
    trained_length: int
    policy: dict[str, Any] | None  # the model's state_policy
    kept_attention: list[int]  # layers that are not recurrent
    losses: Losses
    probes: list[int]  # numbers of tokens read when the states were probed
    heads: list[Head]
    remembrance: list[Remembrance]
    fix: Fix | None = None

    def as_dict(self) -> dict[str, Any]:
        """All results; numbers that are not finite are None."""
        return plain({**asdict(self), "words": self.words()})

    def words(self) -> list[str]:
        """The results in sentences."""
        return [*self._origin(), self._loss_words(), *self._head_words(), *self._reach_words()]

    def _origin(self) -> list[str]:
        said = []
        if self.restarts:
            said.append(
                f"The text ended before {self.tokens:,} tokens and was read {self.restarts + 1} "
                "times. Repeated text is easier to predict: give a longer text to compare losses."
            )
        if self.policy is not None:
            said.append(f"The model has a state_policy: {describe(self.policy)}.")
        if self.kept_attention:
            names = ", ".join(map(str, self.kept_attention))
            said.append(
                f"Layers {names} keep softmax attention. They have no recurrent state that could "
                "collapse; they store every token of the text or of their window."
            )
        return said

    def _loss_words(self) -> str:
        since = self.losses.falls_apart_from
        if not math.isfinite(self.losses.excess):
            return f"The loss is not finite from {since:,} tokens on."
        comparison = (
            f"beyond the trained length it is {self.losses.ratio:.3f} times the loss of the same "
            f"tokens read from an empty state ({self.losses.excess:+.4f} nats)."
        )
        if since is None:
            return f"The loss stays good up to {self.tokens:,} tokens: {comparison}"
        return f"The loss breaks down from {since:,} tokens on: {comparison}"

    def _head_words(self) -> list[str]:
        said = []
        for verdict in (COLLAPSES, GREW, KEEPS):
            found = sorted(self._with(verdict), key=lambda x: x.since or 0)
            if not found:
                continue
            named = ", ".join(
                f"{x.layer}.{x.head}" + (f" from {x.since:,} tokens on" if x.since else "")
                for x in found[:NAMED]
            )
            more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
            count = f"{len(found)} of {len(self.heads)}"
            said.append(f"Heads that {MEANING[verdict]}: {count}. Layer.head {named}{more}.")
        grown = self._with(COLLAPSES) + self._with(GREW)
        slow = [x for x in grown if x.kept > 0.5]
        if slow:
            said.append(
                f"Of the {len(grown)} heads whose states leave their training range, {len(slow)} "
                "keep more than half of the first token over the trained length: training never "
                "made them forget."
            )
        if grown and self.losses.falls_apart_from is None:
            said.append("So far this does not harm the loss.")
        if not grown:
            said.append(f"None of {len(self.heads)} heads collapses.")
        return said

    def _reach_words(self) -> list[str]:
        return [
            f"Without the first {start:,} of {x.length:,} tokens, {value:.3f} of the probability "
            "of the next token moves to other tokens (effective remembrance)."
            for x in self.remembrance
            for start, value in x.by_start[:1]
        ]

    def _with(self, verdict: str) -> list[Head]:
        return [x for x in self.heads if x.verdict == verdict]

    def worst(self, count: int) -> list[Head]:
        """The heads whose states grew most; heads without a finite norm come first."""
        return sorted(self.heads, key=lambda x: _order(x.growth), reverse=True)[:count]

    def lines(self) -> list[str]:
        x = self.losses
        lines = [
            f"{self.model} on {self.tokens:,} tokens of {self.text}, trained on "
            f"{self.trained_length:,}",
            "",
            *self.words(),
            "",
            f"loss in nats per token: {x.inside:.4f} within the trained length, {x.beyond:.4f} "
            "beyond it"
            + ("" if x.beyond_four is None else f", {x.beyond_four:.4f} beyond four times it"),
            f"  {'tokens before':>23}{'loss':>10}{'perplexity':>14}",
        ]
        for bucket in x.by_position:
            place = f"{bucket.start:,} to {min(bucket.end, self.tokens) - 1:,}"
            lines.append(f"  {place:>23}{bucket.loss:10.4f}{perplexity(bucket.loss):>14}")
        lines += [
            "",
            f"  {'the same tokens':>23}{'stream':>10}{'empty state':>14}{'difference':>12}",
        ]
        for span in x.spans:
            place = f"{span.start:,} to {span.end - 1:,}"
            difference = span.loss - span.anew
            lines.append(f"  {place:>23}{span.loss:10.4f}{span.anew:14.4f}{difference:+12.4f}")
        lines += ["", *self._worst_lines(), "", *self._remembrance_lines()]
        return lines if self.fix is None else [*lines, "", *self.fix.lines()]

    def _worst_lines(self) -> list[str]:
        lines = [
            f"the {min(WORST, len(self.heads))} heads whose states grew most: norm at the end "
            "divided by the largest within the trained length,",
            "  share of the first token that is kept, half-life in tokens, share of the squares in "
            "the top 5 % of elements and key channels, kurtosis",
            f"  {'layer.head':>10}{'growth':>9}{'kept':>8}{'half-life':>11}{'elements':>10}"
            f"{'channels':>10}{'kurtosis':>10}  verdict",
        ]
        for head in self.worst(WORST):
            last = {name: values[-1] for name, values in head.statistics.items()}
            since = f" from {head.since:,}" if head.since else ""
            lines.append(
                f"  {f'{head.layer}.{head.head}':>10}{head.growth:9.2f}{head.kept:8.3f}"
                f"{head.half_life:11,.0f}{last['top_elements']:10.3f}{last['top_channels']:10.3f}"
                f"{last['kurtosis']:10.1f}  {head.verdict}{since}"
            )
        return lines

    def _remembrance_lines(self) -> list[str]:
        lines = ["effective remembrance: change of predictions without the first tokens"]
        for x in self.remembrance:
            starts = "".join(f"{start:9,}" for start, _ in x.by_start)
            values = "".join(f"{value:9.3f}" for _, value in x.by_start)
            lines += [f"  of {x.length:9,}{starts}", f"  {'':12}{values}"]
        return lines


def describe(policy: dict[str, Any]) -> str:
    """The fields of a policy in words; per-head thresholds are not listed."""
    named = {k: "per head" if isinstance(v, list | tuple) else v for k, v in policy.items()}
    return ", ".join(f"{name} {value}" for name, value in named.items())


def perplexity(loss: float) -> str:
    return f"{math.exp(loss):,.3f}" if loss < 20 else "more than 10⁸"


def plain(x: Any) -> Any:
    """A value for JSON: floats with seven digits, and None for floats that are not finite."""
    if isinstance(x, dict):
        return {key: plain(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [plain(value) for value in x]
    if isinstance(x, float):
        return float(f"{x:.7g}") if math.isfinite(x) else None
    return x


def _order(x: float) -> float:
    return math.inf if math.isnan(x) else x
