"""A file of records that is written batch by batch and appears when it is complete.

Until then the batches stand beside it in `.NAME.draft`: the settings in the first line, and one
batch in each line after it. A process that is killed leaves whole lines and at most one broken one,
so the next process goes on behind the last whole batch.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from supra.checkpoint.files import check_new, held, staged_file
from supra.errors import UserError, shown

Counted = tuple[dict[str, Any], int]
"""A record, and its number of tokens."""


@dataclass
class Draft:
    """batches: how many are there. tokens: of all records. idle: the last batches without one."""

    file: Path
    lines: TextIO
    batches: int = 0
    tokens: int = 0
    idle: int = 0
    done: list[Counted] = field(default_factory=list)

    def add(self, records: Sequence[Counted]) -> None:
        """Write a batch: records with their numbers of tokens."""
        print(json.dumps(list(records), ensure_ascii=False), file=self.lines, flush=True)
        self.count(records)

    def count(self, records: Sequence[Counted]) -> None:
        self.batches += 1
        self.idle = 0 if records else self.idle + 1
        self.tokens += sum(tokens for _, tokens in records)
        self.done += [(record, tokens) for record, tokens in records]

    def finish(self, tokens: int) -> None:
        """Write the file: as many records as give this number of tokens."""
        total = 0
        with staged_file(self.file) as staging, staging.open("w", encoding="utf-8") as lines:
            for record, count in self.done:
                if total >= tokens:
                    break
                print(json.dumps(record, ensure_ascii=False), file=lines)
                total += count


@contextmanager
def opened(file: Path, settings: dict[str, Any]) -> Iterator[Draft]:
    """The draft of a file: a new one, or that of an earlier process with the same settings.

    Raises UserError when the file is there, when the draft was begun with other settings, or while
    another process writes it.
    """
    path = file.absolute().with_name(f".{file.name}.draft")
    if file.exists() and path.exists() and _read(path)[0] == settings:
        path.unlink()  # of a process that was killed when the file was there
    check_new(file, "--out")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    with held(path, file):
        before, batches = _read(path)
        if before is not None:
            _check_same(path, before, settings)
        with path.open("a", encoding="utf-8") as lines:
            draft = Draft(file, lines)
            if before is None:
                print(json.dumps(settings), file=lines, flush=True)
            for records in batches:
                draft.count(records)
            try:
                yield draft
            finally:
                if file.exists() or not draft.batches:
                    path.unlink()


def _read(path: Path) -> tuple[dict[str, Any] | None, list[list[Counted]]]:
    """The settings of a draft, None for an empty one, and its batches. What was written of a last
    line is cut off."""
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        with path.open("r+b") as file:
            file.truncate(len(whole))
    try:
        settings, *batches = [json.loads(line) for line in whole.split(b"\n")[:-1]] or [None]
        return settings, [[(record, int(tokens)) for record, tokens in x] for x in batches]
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged ({error}): remove that file, and the same command begins anew"
        ) from error


def _check_same(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    changed = [
        f"{key}: {shown(before.get(key))} there, {shown(now.get(key))} here"
        for key in now
        if before.get(key) != now[key]
    ]
    if changed:
        raise UserError(
            f"{path} was begun with other settings ({'; '.join(changed)}): give those to continue, "
            "remove that file to begin anew, or give another --out"
        )
