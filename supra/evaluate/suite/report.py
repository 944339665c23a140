"""The results of the suite as lines for a terminal and as a section of the model card."""

from collections.abc import Mapping, Sequence

from supra.evaluate.suite import in_context
from supra.evaluate.suite.measure import (
    ACCURACY,
    KEPT,
    LOST,
    UNCLEAR,
    WEAKENED,
    Comparison,
    Measure,
)
from supra.evaluate.suite.parts import Settings

LARGE = 10_000  # perplexities from here on are shown with two digits
MEANING = {
    KEPT: "at least 90 % of the teacher's",
    WEAKENED: "50 % to 90 %",
    LOST: "less than 50 %",
    UNCLEAR: "the teacher is no better than chance, or there are too few items",
}


def lines(
    model: str,
    teacher: str,
    comparisons: Sequence[Comparison],
    words: Mapping[str, Sequence[str]],
) -> list[str]:
    """The table, in-context accuracy by task, and what is kept, weakened and lost."""
    found = [f"{model} beside {teacher}", f"{'':40}{'teacher':>18}{'model':>18}{'kept':>14}"]
    for pair in comparisons:
        cells = f"{_cell(pair.teacher):>18}{_cell(pair.student):>18}{_kept(pair):>14}"
        word = "" if pair.student.detail else pair.word
        found.append(f"{_title(pair.student):40}{cells}  {word}".rstrip())
    found += _by_task([pair.student for pair in comparisons], [x.teacher for x in comparisons])
    found.append("")
    found += [
        f"{name} ({MEANING[name]}): {', '.join(words[name])}" for name in words if words[name]
    ]
    return found


def lines_alone(model: str, measures: Sequence[Measure]) -> list[str]:
    """The table of one model."""
    found = [model]
    found += [f"{_title(x):40}{_cell(x):>18}{len(x.values):9,d} items" for x in measures]
    return found + _by_task(measures)


def card(
    teacher: str,
    comparisons: Sequence[Comparison],
    words: Mapping[str, Sequence[str]],
    settings: Settings,
) -> str:
    """The section of the model card: the table, and what the words mean."""
    rows = ["| | teacher | this model | kept | |", "| --- | ---: | ---: | ---: | --- |"]
    for pair in comparisons:
        if not pair.student.detail:
            cells = _cell(pair.teacher), _cell(pair.student), _kept(pair), pair.word
            rows.append(f"| {_title(pair.student)} | {' | '.join(cells)} |")
    meanings = "; ".join(f"{name}: {MEANING[name]}" for name in words if words[name])
    size = "all items" if settings.limit is None else f"at most {settings.limit} items of each part"
    return "\n".join(
        [
            f"Measured by `supra eval suite`, beside {teacher}, on {size}; ± one standard error.",
            "",
            *rows,
            "",
            f"{meanings[:1].upper()}{meanings[1:]}.",
        ]
    )


def _title(measure: Measure) -> str:
    chance = f" (chance {measure.chance:.2f})" if measure.chance else ""
    return ("  " if measure.detail else "") + measure.title + chance


def _cell(measure: Measure) -> str:
    error = measure.standard_error
    return _number(measure, measure.value) + (
        "" if error is None else f" ± {_number(measure, error)}"
    )


def _number(measure: Measure, value: float) -> str:
    if measure.kind == ACCURACY:
        return f"{value:.3f}"
    return f"{value:,.2f}" if value < LARGE else f"{value:.2g}"


def _kept(pair: Comparison) -> str:
    if pair.kept is None:
        return "–"
    error = pair.standard_error
    return f"{100 * pair.kept:.0f} %" + ("" if error is None else f" ± {100 * error:.0f}")


def _by_task(ours: Sequence[Measure], theirs: Sequence[Measure] = ()) -> list[str]:
    """In-context accuracy of every task by number of shots, the teacher's in front if there is
    one."""
    ours, theirs = ([x for x in some if x.part == in_context.PART] for some in (ours, theirs))
    if not ours:
        return []
    heads = "".join(f"{x.name:>16}" for x in ours)
    what = "teacher → model" if theirs else "accuracy"
    found = ["", f"in-context tasks: {what:23}{heads}"]
    for task in ours[0].by_stratum():
        cells = [f"{x.by_stratum()[task]:.2f}" for x in ours]
        if theirs:
            cells = [
                f"{x.by_stratum()[task]:.2f} → {y}" for x, y in zip(theirs, cells, strict=True)
            ]
        found.append(f"  {task:39}" + "".join(f"{cell:>16}" for cell in cells))
    return found
