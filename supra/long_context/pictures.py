"""Draws loss.png and states.png. matplotlib is only imported here, and needs no screen."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from supra.long_context.findings import Diagnosis, Head
from supra.long_context.stream import Bucket
from supra.long_context.words import GROWN

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINES = 8  # heads whose growth over time is drawn
STEADY = 64  # minimum tokens per point, because the loss of a single token varies too much
DPI = 150


def draw_loss(found: Diagnosis, path: Path) -> None:
    """Loss by position, in the stream and in spans read from an empty state; below it, the loss
    before and after a cure."""
    fix = found.fix if found.fix is not None and found.fix.best is not None else None
    figure, axes = _figure(8, 4.5 if fix is None else 8, rows=1 if fix is None else 2)
    top = axes[0]
    _line(top, found.losses.fine, "stream", "C0")
    for name, color, values in (
        ("stream, some parts", "C0", [x.loss for x in found.losses.spans]),
        ("the same tokens from an empty state", "C1", [x.anew for x in found.losses.spans]),
    ):
        places = [(x.start + x.end) / 2 for x in found.losses.spans]
        top.plot(places, values, "o", color=color, label=name, markersize=5)
    _label(top, found.trained_length, f"{found.model} on {found.text}")
    if fix is not None:
        for name, color in (("none", "C0"), (fix.best, "C2")):
            _line(axes[1], fix.trial(name).fine, name, color)
        _label(axes[1], found.trained_length, f"cures on {fix.text}")
    figure.savefig(path, dpi=DPI)


def draw_states(found: Diagnosis, path: Path) -> None:
    """The growth of every head's state, and the norms of the worst heads over time."""
    figure, (left, right) = _figure(12, 5, columns=2)
    growth = heat(found.heads, found.kept_attention)
    image = left.imshow(growth, aspect="auto", cmap="RdBu_r", vmin=-3, vmax=3, origin="lower")
    figure.colorbar(image, ax=left, label="log2 of norm at the end / largest in training")
    left.set(xlabel="head", ylabel="layer", title="growth of states (empty: kept attention)")
    left.yaxis.get_major_locator().set_params(integer=True)
    left.xaxis.get_major_locator().set_params(integer=True)
    for head in found.worst(LINES):
        norms = [x / head.largest_norm for x in head.statistics["norm"] if head.largest_norm > 0]
        if norms:
            name = f"{head.layer}.{head.head} {head.verdict}"
            right.plot(found.probes, norms, label=name, linewidth=1)
    right.axhline(GROWN, color="gray", linestyle=":", linewidth=1)
    right.set_yscale("log", base=2)
    _label(right, found.trained_length, "the heads that grew most")
    right.set_ylabel("norm / largest in training")
    figure.savefig(path, dpi=DPI)


def heat(heads: Sequence[Head], kept: Sequence[int]) -> list[list[float]]:
    """log2 of growth by layer and head; NaN where the head does not exist or growth is not
    finite."""
    layers = 1 + max([x.layer for x in heads] + list(kept))
    table = [[math.nan] * (1 + max(x.head for x in heads)) for _ in range(layers)]
    for x in heads:
        if x.growth > 0 and math.isfinite(x.growth):
            table[x.layer][x.head] = math.log2(x.growth)
    return table


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, list]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).flatten().tolist()


def joined(buckets: Sequence[Bucket]) -> list[Bucket]:
    """Join buckets so that each has at least STEADY tokens and an eighth of an octave; the axis is
    in octaves."""
    found: list[Bucket] = []
    for x in buckets:
        last = found[-1] if found else None
        if last is None or (last.tokens >= STEADY and x.end > last.start * 2 ** (1 / 8)):
            found.append(x)
            continue
        tokens = last.tokens + x.tokens
        loss = (last.loss * last.tokens + x.loss * x.tokens) / tokens
        found[-1] = Bucket(last.start, x.end, tokens, loss)
    return found


def _line(axes: "Axes", buckets: Sequence[Bucket], name: str, color: str) -> None:
    buckets = joined(buckets)
    places = [(x.start + x.end) / 2 for x in buckets]
    axes.plot(places, [x.loss for x in buckets], label=name, color=color, linewidth=1.2, alpha=0.8)


def _label(axes: "Axes", trained: int, title: str) -> None:
    axes.axvline(trained, color="black", linestyle="--", linewidth=1, label="trained length")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens read before", ylabel="nats per token")
    axes.set_title(title, fontsize="medium", wrap=True)
    axes.legend(fontsize="small")
