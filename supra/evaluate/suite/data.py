"""The files of the evaluation sets. Every record is checked before a model is loaded."""

import gzip
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from supra.errors import UserError, shown

SUFFIXES = (".jsonl", ".jsonl.gz")
TEXT = "text"

Fields = Mapping[str, str | Sequence[Any]]
"""What a record must hold: the name of a field, and "text" or the values that it may have."""


def check_folder(data: str | Path) -> Path:
    """The folder with the evaluation sets. Raises UserError if it does not exist."""
    folder = Path(data).expanduser()
    if not folder.is_dir():
        raise UserError(f"--data (={data}): there is no such folder")
    return folder


def find_file(folder: Path, pattern: str, part: str) -> Path:
    """The one file of a folder that a pattern such as `piqa*.jsonl*` fits."""
    found = sorted(file for file in folder.glob(pattern) if file.name.endswith(SUFFIXES))
    if not found:
        raise UserError(
            f"--data (={folder}) has no file for {part} ({pattern}): "
            f"add one, or leave {part} out of --tasks"
        )
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise UserError(f"--data (={folder}) has several files for {part}: keep one of {names}")
    return found[0]


def read_records(file: Path, fields: Fields) -> list[dict[str, Any]]:
    """The records of a file of JSON lines. Raises UserError with the line of the first fault."""
    opened = gzip.open if file.suffix == ".gz" else open
    try:
        with opened(file, "rb") as lines:
            numbered = [(n, line) for n, line in enumerate(lines, start=1) if line.strip()]
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    records = []
    for number, line in numbered:
        try:
            records.append(_record(line, fields))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}, line {number}: {error}") from error
    if not records:
        raise UserError(f"{file} holds no records")
    return records


def evenly(count: int, limit: int | None) -> list[int]:
    """`limit` of `count` places, at even distances; all of them without a limit."""
    kept = count if limit is None else min(limit, count)
    return [at * count // kept for at in range(kept)]


def _record(line: bytes, fields: Fields) -> dict[str, Any]:
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError(f"{shown(record)} is not a JSON object")
    for name, wanted in fields.items():
        if name not in record:
            raise ValueError(f"there is no field {name!r}: the record has {', '.join(record)}")
        value = record[name]
        if wanted == TEXT:
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f"field {name!r} (={shown(value)}) must be text")
            value.encode()  # raises for an escape that is half a character
        elif not any(value == x and type(value) is type(x) for x in wanted):
            choices = ", ".join(map(str, wanted))
            raise ValueError(f"field {name!r} (={shown(value)}) must be one of {choices}")
    return record
