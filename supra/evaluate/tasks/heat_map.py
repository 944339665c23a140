"""A table of shares as a picture. matplotlib is only imported when a picture is drawn."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from supra.errors import UserError

DPI = 150
DARK = 0.35  # colours are dark where a share differs from 0.5 by more than this
MAX_COLUMNS_WITH_NUMBERS = 16  # with more columns, cells are too narrow for numbers


def need_matplotlib(picture: str) -> None:
    """Raise UserError if matplotlib is missing; `picture` is the option that asks for it."""
    if find_spec("matplotlib") is None:
        raise UserError(
            f"{picture} is drawn with matplotlib, which is not installed: pip install matplotlib"
        )


def check_heat_map(file: Path) -> None:
    """Raise UserError if matplotlib is missing, or if the file cannot be written."""
    need_matplotlib("--picture")
    if file.suffix != ".png":
        raise UserError(f"--picture (={file}) must be a file that ends in .png")
    if not file.absolute().parent.is_dir():
        raise UserError(f"--picture (={file}): make the folder {file.parent} first, it is missing")


def draw_heat_map(
    file: Path,
    shares: Sequence[Sequence[float]],
    *,
    columns: Sequence[str],
    rows: Sequence[str],
    labels: tuple[str, str],
    title: str,
) -> None:
    """Write a PNG.

    shares: from 0 to 1; one list per column, from top to bottom.
    labels: of the x axis and the y axis.
    """
    from matplotlib.figure import Figure

    width = max(5.5, 2.2 + 0.6 * len(columns))
    figure = Figure(figsize=(width, 1.6 + 0.35 * len(rows)), layout="constrained")
    axes = figure.subplots()
    table = list(zip(*shares, strict=True))
    image = axes.imshow(table, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    if len(columns) <= MAX_COLUMNS_WITH_NUMBERS:
        for y, row in enumerate(table):
            for x, share in enumerate(row):
                color = "white" if abs(share - 0.5) > DARK else "black"
                middle = {"ha": "center", "va": "center"}
                axes.text(x, y, f"{share:.2f}", color=color, fontsize="x-small", **middle)
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlabel=labels[0], ylabel=labels[1])
    axes.set_title(title, fontsize="medium")
    figure.colorbar(image, ax=axes, label="accuracy")
    figure.savefig(file, dpi=DPI)
