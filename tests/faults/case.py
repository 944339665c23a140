"""One row of the table of bad inputs: a command, what it is given, and what it must say."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Make = Callable[[Path, Path], None]
"""(folder of the case, folder of what all cases share): writes the input."""


@dataclass(frozen=True)
class Case:
    """`command` has places in it: {base}, {rnn}, {text} … of the shared folder, see shared.py, and
    {here}, {model}, {file}, {out} of the case's own.

    says: parts of the one line that a refusal prints; of a tuple one of them. accepted: why the
        input is no fault.
    """

    name: str
    command: str
    make: Make | None = None
    says: tuple[str | tuple[str, ...], ...] = ()
    accepted: str | None = None


def refused(
    command: str, *says: str | tuple[str, ...], make: Make | None = None, name: str | None = None
) -> Case:
    """Exit code 2, one line that has all of `says`, and nothing written."""
    assert says, f"{command}: what must the line name?"
    return Case(name or command, command, make, says=says)


def accepted(command: str, reason: str, make: Make | None = None, name: str | None = None) -> Case:
    """Exit code 0, for a reason."""
    return Case(name or command, command, make, accepted=reason)


def copied(shared: str, *changes: Callable[[Path], None]) -> Make:
    """{model}: a copy of a shared folder with changes to it."""

    def make(here: Path, common: Path) -> None:
        shutil.copytree(common / shared, here / "model")
        for change in changes:
            change(here / "model")

    return make


def written(name: str, content: str | bytes) -> Make:
    """{here}/name, a file or, in folders of its own, a file there."""
    return lambda here, common: put(here / name, content)


def put(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def file(name: str, content: str | bytes) -> Callable[[Path], None]:
    """A change: the file has this content."""
    return lambda folder: put(folder / name, content)


def without(name: str) -> Callable[[Path], None]:
    """A change: the file is not there."""
    return lambda folder: (folder / name).unlink()


def cut(name: str, share: float = 0.5) -> Callable[[Path], None]:
    """A change: the file ends early."""

    def change(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])

    return change


def fields(changes: dict[str, Any], name: str = "config.json") -> Callable[[Path], None]:
    """A change: fields of a JSON file; "a.b" is b within a, and REMOVED leaves it out."""

    def change(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        for dotted, value in changes.items():
            *parents, last = dotted.split(".")
            inner = values
            for parent in parents:
                inner = inner[parent]
            if value is REMOVED:
                del inner[last]
            else:
                inner[last] = value
        (folder / name).write_text(json.dumps(values))

    return change


REMOVED = object()
BINARY = bytes(range(256)) * 4
DEEP = "[" * 100_000  # more than the stack of any parser that recurses
