"""Values of command line arguments, out of their text."""

import argparse
from pathlib import Path

from supra.errors import UserError, shown
from supra.uptrain.limits import check_options


def folder(text: str) -> Path:
    """A folder to make; an empty name would mean the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("names no folder")
    return Path(text)


def parse_names(text: str) -> list[str]:
    """`"a,b"` as a list; empty text is none."""
    return [part.strip() for part in text.split(",") if part.strip()]


def parse_integers(argument: str, text: str) -> list[int]:
    """`"3,7"` as a list; empty text is none."""
    try:
        values = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UserError(
            f"--{argument} {shown(text)} must be integers with commas, as 3,7"
        ) from None
    if values:
        check_options({argument.replace("-", "_"): max(values)})
    return values


def parse_seeds(text: str) -> list[int]:
    """`"0,1,2"` as a list of one at least."""
    seeds = parse_integers("seeds", text)
    if not seeds or min(seeds) < 0:
        raise UserError(f"--seeds {text!r} must name seeds from 0 on, as 0,1,2")
    return seeds
