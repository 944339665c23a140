"""Folders that are complete or not there: write beside, fsync, rename."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from supra.errors import UserError


def check_vacant(folder: Path, argument: str = "out") -> None:
    """Raise UserError unless the folder is missing or empty."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(
            f"{argument} (={folder}) holds something already: name a new folder, or empty this one"
        )


def check_space(folder: Path, needed: int) -> None:
    """Raise UserError when the disk of `folder` cannot hold `needed` more bytes."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"out (={folder}) needs {needed / 1e9:.1f} GB and its disk has {free / 1e9:.1f} GB "
            "free: make room, or name a folder on another disk"
        )


@contextmanager
def staged_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder beside `folder` to write in; it takes its name when all went well.

    On any error it is removed. What a killed process left behind is removed by the next one.
    """
    folder = folder.absolute()
    staging = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        with disk_errors():
            yield staging
        for path in staging.rglob("*"):
            fsync(path)
        fsync(staging)
        if folder.is_dir():
            folder.rmdir()
        os.rename(staging, folder)
        fsync(folder.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


@contextmanager
def disk_errors() -> Iterator[None]:
    """A full disk, which safetensors reports as an error of its own, becomes an OSError."""
    try:
        yield
    except SafetensorError as error:
        if "No space left" in str(error) or "os error 28" in str(error):
            raise OSError(errno.ENOSPC, "No space left on device") from error
        raise


def fsync(path: Path) -> None:
    """Force a file or a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_between(page: Path, name: str, text: str) -> None:
    """Put text where a page has some between `<!-- name -->` and `<!-- end of name -->`."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, rest = page.read_text(encoding="utf-8").split(begin)
    page.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}", encoding="utf-8")
