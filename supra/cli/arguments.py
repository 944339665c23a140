"""Values of command line options, read from their text.

Each function takes the option's name for its messages, and raises UserError for a wrong value.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from supra.errors import UserError, check_choice, shown
from supra.uptrain import limits

SIZE = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)([KMG])(i?)B", re.IGNORECASE)


def parse_whole(option: str, text: str, minimum: int | None, maximum: int) -> int:
    """A whole number from `minimum` to `maximum`."""
    try:
        value = int(text)
    except ValueError:
        raise UserError(f"{option} (={shown(text)}) must be a whole number") from None
    _check_range(option, value, minimum, maximum)
    return value


def parse_integers(
    option: str, text: str, minimum: int | None = None, maximum: int | None = None
) -> list[int]:
    """`"3,7"` as a list of whole numbers from `minimum` to `maximum`; [] for ""."""
    try:
        values = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UserError(f"{option} {shown(text)} must be integers with commas, as 3,7") from None
    for value in values:
        _check_range(option, value, minimum, maximum)
    return values


def parse_seeds(text: str) -> list[int]:
    """`"0,1,2"` as a list with at least one seed."""
    seeds = parse_integers("--seeds", text, maximum=limits.SEED)
    if not seeds or min(seeds) < 0:
        raise UserError(f"--seeds {text!r} must name seeds from 0 on, as 0,1,2")
    return seeds


def parse_number(option: str, text: str) -> float:
    """Any number, also inf and nan."""
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{option} (={shown(text)}) must be a number") from None


def parse_names(option: str, text: str) -> list[str]:
    """`"a,b"` as a list; [] for ""."""
    return [part.strip() for part in text.split(",") if part.strip()]


def parse_choice(option: str, text: str, choices: Sequence[str]) -> str:
    """One of `choices`."""
    check_choice(option, text, choices)
    return text


def parse_text(option: str, text: str) -> str:
    """The text as it is, also where it is not valid UTF-8."""
    return text


def parse_memory(option: str, text: str) -> dict[int | str, int]:
    """`"0=20GB,cpu=8GiB"` as bytes by device; the number of a GPU is an integer."""
    found: dict[int | str, int] = {}
    for part in parse_names(option, text) or [""]:
        device, _, size = part.partition("=")
        known = SIZE.fullmatch(size)
        if not device or known is None or device in map(str, found):
            raise UserError(
                f"{option} (={shown(text)}) must give each device one size, in KB, MB, GB, KiB, "
                "MiB or GiB: as cpu=8GB, or 0=20GB,cpu=60GB"
            )
        number, prefix, binary = known.groups()
        power = "KMG".index(prefix.upper()) + 1
        size_in_bytes = float(number) * (1024 if binary else 1000) ** power
        found[int(device) if device.isdecimal() else device] = int(size_in_bytes)
    return found


def parse_file(option: str, text: str) -> Path:
    """The path of a file."""
    return Path(text)


def parse_folder(option: str, text: str) -> Path:
    """The path of a folder to make; an empty name would mean the current folder."""
    if not text.strip():
        raise UserError(f"{option} (={shown(text)}) must name a folder")
    return Path(text)


def _check_range(option: str, value: int, minimum: int | None, maximum: int | None) -> None:
    if minimum is not None and value < minimum:
        raise UserError(f"{option} (={shown(value)}) must be at least {minimum}")
    if maximum is not None and value > maximum:
        raise UserError(f"{option} (={shown(value)}) must be at most {maximum}")
