"""`supra diagnose --fix auto`: tries the cures that need no training, and keeps the best.

It tries these settings (after Chen et al. 2024, arXiv 2410.07145v1); L is the trained length:

    decay_scale   1 − 1/(kL) for k = 1/2, 1, 2, 3: a token fades within kL tokens, whatever the
                  gates are
    window        L/2, L, 2L
    norm          the largest norm within the trained length, per layer and head; and half of it,
                  which was the better one in docs/long_context.md
    insert_scale  0.75, together with the best decay_scale
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from supra.checkpoint.files import fsync
from supra.errors import UserError
from supra.long_context.apply_policy import use_policy
from supra.long_context.stream import Bucket, Buckets, Reader, cuts, fine_edges, mean_loss
from supra.mixers.state_policy import StatePolicy

NONE, CONFIGURED = "none", "as configured"
INSIDE = 0.01  # maximum cost of a cure within the trained length, relative to the loss there
# Minimum gain beyond the trained length, relative to the loss there: twice the statistical error
# of the difference of two losses over 7,000 tokens.
GAIN = 0.002
INSERT_SCALE = 0.75


@dataclass(frozen=True)
class Trial:
    """One policy on the validation text; losses in nats per token."""

    name: str
    policy: dict[str, Any] | None
    inside: float | None = None  # loss within the trained length
    beyond: float | None = None  # loss beyond it
    fine: list[Bucket] | None = None  # loss by position
    note: str = ""  # why a mixer refuses the policy, or that the policy has no effect


@dataclass(frozen=True)
class Fix:
    """The result of all trials."""

    text: str  # the text that was read
    tokens: int
    trained_length: int
    trials: list[Trial]  # the first one is without any policy
    best: str | None  # the name of the best trial; None when nothing helps
    written: str | None  # the file that the best policy was written to

    def trial(self, name: str) -> Trial:
        return next(x for x in self.trials if x.name == name)

    def lines(self) -> list[str]:
        lines = [
            f"cures on {self.tokens:,} tokens of {self.text}: loss within the trained length and "
            "beyond it",
            f"  {'':34}{'within':>10}{'beyond':>10}",
        ]
        for x in self.trials:
            if x.beyond is not None:
                mark = "best" if x.name == self.best else ""
                line = f"  {x.name:34}{x.inside:10.4f}{x.beyond:10.4f}  {mark}  {x.note}"
                lines.append(line.rstrip())
        for reason, names in self.left_out().items():
            lines.append(f"  without {', '.join(names)}: {reason}")
        lines.append(
            f"The best cure has the smallest loss beyond the trained length. It may cost at most "
            f"{INSIDE:.0%} within it, and must gain at least {GAIN:.1%} beyond it."
        )
        if self.best is None:
            return [*lines, "No cure helps: config.json stays as it is."]
        before, after = self.trial(NONE).beyond, self.trial(self.best).beyond
        lines.append(f"Beyond the trained length: {before:.4f} before, {after:.4f} after.")
        if self.written is None:
            return [*lines, "config.json already has this policy."]
        return [*lines, f"wrote state_policy into {self.written}"]

    def left_out(self) -> dict[str, list[str]]:
        """The names of the trials that a mixer refused, by reason."""
        found: dict[str, list[str]] = {}
        for x in self.trials:
            if x.beyond is None:
                found.setdefault(x.note, []).append(x.name)
        return found


def candidates(trained: int, norms: Sequence[Sequence[float]]) -> dict[str, StatePolicy]:
    """The policies to try, by name, without those that combine two settings."""
    found = {}
    for half_lengths in (1, 2, 4, 6):
        span = max(2, half_lengths * trained // 2)
        found[f"decay_scale 1 - 1/{span}"] = StatePolicy(decay_scale=1 - 1 / span)
    for size in (max(1, trained // 2), trained, 2 * trained):
        found[f"window {size}"] = StatePolicy(window=size)
    for name, share in (("norm as in training", 1.0), ("half of that norm", 0.5)):
        thresholds = tuple(tuple(share * x for x in layer) for layer in norms)
        found[name] = StatePolicy(norm=thresholds)
    return found


class _Trials:
    def __init__(
        self,
        model: PreTrainedModel,
        tokens: Tensor,
        labels: Tensor | None,
        trained: int,
        chunk: int,
        advance: Callable[[int], object],
    ):
        self.model, self.trained, self.chunk = model, trained, chunk
        self.tokens, self.labels = tokens, tokens if labels is None else labels
        self.advance = advance
        self.done: list[Trial] = []

    def run(self, name: str, policy: StatePolicy | None, beside: Trial | None = None) -> Trial:
        """Read the text with a policy. `beside` is the trial that this policy adds a setting to."""
        fields = None if policy is None else changed_fields(policy)
        try:
            with use_policy(self.model, policy):
                parts, fine = self._read()
        except UserError as error:
            self.advance(len(self.tokens))
            reason = str(error).partition(" cannot act on ")[2] or str(error)
            self.done.append(Trial(name, fields, note=reason))
            return self.done[-1]
        inside = mean_loss(parts, end=self.trained)
        beyond = mean_loss(parts, start=self.trained)
        # a setting without effect changes the loss by rounding only
        same = beside is not None and abs(beyond - beside.beyond) <= 1e-5 * abs(beside.beyond)
        note = f"no effect: same as {beside.name}" if same else ""
        self.done.append(Trial(name, fields, inside, beyond, fine, note))
        return self.done[-1]

    def _read(self) -> tuple[list[Bucket], list[Bucket]]:
        parts = Buckets([0, self.trained, len(self.tokens)])
        fine, reader = Buckets(fine_edges(len(self.tokens))), Reader(self.model)
        for start, end in cuts(len(self.tokens), self.chunk):
            read = reader.read(self.tokens[start:end], self.labels[start:end])
            parts.add(*read)
            fine.add(*read)
            self.advance(end - start)
        return parts.found(), fine.found()


def try_cures(
    model: PreTrainedModel,
    tokens: Tensor,
    trained: int,
    norms: Sequence[Sequence[float]],
    *,
    labels: Tensor | None = None,
    chunk: int = 1024,
    configured: StatePolicy | None = None,
    advance: Callable[[int], object] = lambda _: None,
) -> tuple[list[Trial], str | None]:
    """Try every cure on tokens [T]. Returns all trials and the name of the best one.

    labels: [T], IGNORE where a token is not scored; None scores all.
    norms: the largest norm of each head's state within the trained length: one list per layer,
        which is empty for layers that kept attention.
    configured: the policy in the model's config, if it has one.
    advance: is called with the number of tokens after each piece of text.
    """
    trials = _Trials(model, tokens, labels, trained, chunk, advance)
    none = trials.run(NONE, None)
    if configured is not None:
        trials.run(CONFIGURED, configured)
    for name, policy in candidates(trained, norms).items():
        trials.run(name, policy)
    scaled = [x for x in trials.done if "decay_scale" in x.name and x.beyond is not None]
    if scaled:
        best = min(scaled, key=lambda x: _order(x.beyond))
        policy = StatePolicy(**best.policy, insert_scale=INSERT_SCALE)
        trials.run(f"{best.name}, insert {INSERT_SCALE}", policy, beside=best)
    return trials.done, choose(none, trials.done)


def trials_of(trained: int, configured: StatePolicy | None) -> int:
    """How often `try_cures` reads its tokens, including the trials without a policy and with
    insert_scale."""
    return 2 + len(candidates(trained, ())) + (configured is not None)


def choose(none: Trial, trials: Sequence[Trial]) -> str | None:
    """The name of the best trial; None when it gains less than GAIN over no policy.

    The best trial has the smallest loss beyond the trained length among those that cost at most
    INSIDE within it.
    """
    limit = (1 + INSIDE) * _order(none.inside)
    fit = [x for x in trials if x.beyond is not None and _order(x.inside) <= limit]
    best = min(fit, key=lambda x: _order(x.beyond), default=none)
    return best.name if _order(best.beyond) < (1 - GAIN) * _order(none.beyond) else None


def _order(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def changed_fields(policy: StatePolicy) -> dict[str, Any]:
    """The fields of a policy that differ from their defaults."""
    defaults = {x.name: x.default for x in fields(policy)}
    return {name: x for name, x in asdict(policy).items() if x != defaults[name]}


def write_policy(folder: Path, policy: dict[str, Any]) -> Path:
    """Write a policy into a checkpoint's config.json, atomically. Returns the file's path."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"state_policy": policy}
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    fsync(partial)
    partial.replace(path)
    return path
