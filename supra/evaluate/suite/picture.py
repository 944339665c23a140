"""The results of the suite as a picture. matplotlib is only imported when it is drawn."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from supra.evaluate.suite import in_context, wikitext
from supra.evaluate.suite.measure import KEPT_FROM, LOST_BELOW, Comparison, Measure
from supra.evaluate.tasks.heat_map import DPI

MAX_SHARE = 120  # %, where bars end
TEACHER, STUDENT = "tab:gray", "tab:blue"


def draw_suite(
    file: Path, name: str, measures: Sequence[Measure], comparisons: Sequence[Comparison]
) -> None:
    """Write a PNG: what is kept, in-context accuracy by shots, perplexity by position.

    Without a teacher, the first panel has the numbers themselves. Empty panels are left out.
    """
    from matplotlib.figure import Figure

    lines = {name: (measures, STUDENT)}
    if comparisons:
        lines = {"teacher": ([x.teacher for x in comparisons], TEACHER), **lines}
    bars = [x for x in comparisons if not x.student.detail and x.kept is not None]
    panels = [_draw_kept] if bars else [_draw_values] if _values(measures) else []
    panels += [_draw_shots] if any(x.part == in_context.PART for x in measures) else []
    panels += [_draw_positions] if any(x.detail for x in measures) else []
    panels = panels or [_draw_kept]  # nothing is clear: an empty panel says so
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    for axes, draw in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw(axes, lines, bars)
    figure.suptitle(name, fontsize="medium")
    figure.savefig(file, dpi=DPI)


Lines = dict[str, tuple[Sequence[Measure], str]]
"""The measures of each model, by its name, and its colour."""


def _draw_kept(axes: Any, lines: Lines, bars: Sequence[Comparison]) -> None:
    shares = [100 * pair.kept for pair in bars]
    errors = [100 * (pair.standard_error or 0) for pair in bars]
    axes.barh([pair.student.title for pair in bars], shares, xerr=errors, color=STUDENT)
    for border in (KEPT_FROM, LOST_BELOW):
        axes.axvline(100 * border, color="black", linewidth=0.8, linestyle=":")
    axes.invert_yaxis()
    axes.set(xlabel="% of the teacher's that is kept", xlim=(min(0, *shares), MAX_SHARE))


def _draw_shots(axes: Any, lines: Lines, bars: Sequence[Comparison]) -> None:
    for name, (measures, color) in lines.items():
        found = [x for x in measures if x.part == in_context.PART]
        names = [x.name.removesuffix(" shots") for x in found]
        errors = [x.standard_error or 0 for x in found]
        axes.errorbar(names, [x.value for x in found], errors, label=name, color=color, marker="o")
    axes.set(xlabel="shots", ylabel="in-context accuracy", ylim=(0, None))
    axes.legend(fontsize="small")


def _draw_positions(axes: Any, lines: Lines, bars: Sequence[Comparison]) -> None:
    for name, (measures, color) in lines.items():
        found = [x for x in measures if x.part == wikitext.PART and "after" in x.name]
        places = [x.name.split()[2] for x in found]
        axes.plot(places, [x.value for x in found], label=name, color=color, marker="o")
    axes.set(xlabel="after this many tokens", ylabel="perplexity of WikiText", yscale="log")
    axes.legend(fontsize="small")


def _draw_values(axes: Any, lines: Lines, bars: Sequence[Comparison]) -> None:
    """One model's accuracies, or its perplexities if there is no accuracy."""
    measures, color = next(reversed(lines.values()))
    shown = _values(measures)
    errors = [x.standard_error or 0 for x in shown]
    axes.barh([x.title for x in shown], [x.value for x in shown], xerr=errors, color=color)
    axes.invert_yaxis()
    axes.set(xlabel=shown[0].kind, xlim=(0, None))


def _values(measures: Sequence[Measure]) -> list[Measure]:
    """Measures of one kind that no other panel shows."""
    shown = [x for x in measures if not x.detail and x.part != in_context.PART]
    kind = min((x.kind for x in shown), default=None)
    return [x for x in shown if x.kind == kind]
