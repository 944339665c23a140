"""A picture of where a student loses recall: by training, layers kept, window and state.

    python recipes/grid.py ROW --tokens 32_768 --suite DIR --tasks lambada,in_context …
    python recipes/lost.py --tokens 32_768

The first command makes a row; the rows are those of AXES. The second draws those that are there
into docs/results/lost.png.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from supra.errors import UserError, command
from supra.evaluate.tasks.heat_map import DPI, need_matplotlib

HERE = Path(__file__).parent
RESULTS, PICTURE = HERE / "results", HERE.parent / "docs" / "results" / "lost.png"
STEP = 1024  # tokens of a row with one training step, which shows what calibration alone gives
SHOWN = {"lambada acc": "LAMBADA", "in_context 16 shots": "in context, 16 shots"}
# the places of each axis, the rows of the grid that show them, and their tokens if not all
AXES = {
    "training (gated_deltanet)": {
        "calibrated": ("gated_deltanet", STEP),
        "layer by layer": ("gated_deltanet_align",),
        "both stages": ("gated_deltanet",),
    },
    "layers kept (window)": {
        "0": ("window",),
        "1": ("hybrid_auto_1",),
        "2": ("hybrid_auto_2",),
        "4": ("hybrid_auto_4",),
        "8": ("hybrid_auto",),
    },
    "tokens of the window (window)": {
        "64": ("window",),
        "256": ("window_256",),
        "1024": ("window_1024",),
    },
    "channels of a key (gated_deltanet)": {
        "64": ("gated_deltanet_small",),
        "128": ("gated_deltanet",),
    },
}


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=32_768, help="of the rows; default 32_768")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    need_matplotlib(PICTURE.name)
    found = {
        axis: {place: suite(arguments, *row) for place, row in places.items()}
        for axis, places in AXES.items()
    }
    found = {axis: {k: x for k, x in places.items() if x} for axis, places in found.items()}
    if not any(found.values()):
        raise UserError(
            f"--tokens (={arguments.tokens}): {RESULTS.name}/ has no row of the picture with so "
            "many tokens that was measured with --suite"
        )
    for axis, places in found.items():
        print(f"\n{axis}", *(line(place, measures) for place, measures in places.items()), sep="\n")
    PICTURE.parent.mkdir(exist_ok=True)
    draw(PICTURE, {axis: places for axis, places in found.items() if places})
    print(f"\nwrote {PICTURE.name}")


def suite(arguments: argparse.Namespace, row: str, tokens: int | None = None) -> dict[str, Any]:
    """The measures of a row; empty if it was not measured."""
    file = RESULTS / f"{row}-{tokens or arguments.tokens}-{arguments.seed}.json"
    return json.loads(file.read_text()).get("suite", {}) if file.exists() else {}


def line(place: str, measures: dict[str, Any]) -> str:
    """What is kept at one place, in words."""
    shares = (f"{name} {measures[title]['kept']:.0%}" for title, name in SHOWN.items())
    return f"  {place}: {', '.join(shares)}"


def draw(file: Path, found: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Write a PNG with a panel for each axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.5 * len(found), 3.5), layout="constrained")
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for panel, (axis, places) in zip(panels, found.items(), strict=True):
        for title, name in SHOWN.items():
            measures = [x[title] for x in places.values()]
            shares = [100 * x["kept"] for x in measures]
            errors = [100 * x["kept_standard_error"] for x in measures]
            panel.errorbar(list(places), shares, errors, label=name, marker="o", capsize=3)
        panel.set(xlabel=axis)
    panels[0].set(ylabel="% of the teacher's that is kept", ylim=(0, None))
    panels[0].legend(fontsize="small")
    figure.savefig(file, dpi=DPI)


if __name__ == "__main__":
    main()
