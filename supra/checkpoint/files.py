"""Folders appear complete or not at all: written under another name, synced, then renamed.

Only one process writes a folder at a time.
"""

import errno
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from supra.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

SAMPLES, SAMPLE_BYTES = 16, 2**16  # a fingerprint reads this many samples of this size
# These names occur in torch's message for any file that it cannot write. It hides the system's
# reason.
_TORCH_WRITER = ("inline_container", "PytorchStreamWriter")


def check_vacant(folder: Path, argument: str = "out") -> None:
    """Raise UserError unless the folder is missing or empty."""
    if folder.is_file():
        raise UserError(f"{argument} (={folder}) is a file: name a folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(
            f"{argument} (={folder}) is not empty: name a new folder, or empty this one"
        )


def check_new(file: Path, argument: str = "out") -> None:
    """Raise UserError if there is something under the name of a file that is to be written."""
    if file.exists():
        raise UserError(f"{argument} (={file}) exists: name a new file, or remove it")


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
    """Yield a folder beside `folder` to write in, and rename it to `folder` after success.

    On any error it is removed. The remains of a killed process are removed by the next process.
    Raises UserError while another process writes the same folder.
    """
    folder = folder.absolute()
    staging = folder.with_name(f".{folder.name}.partial")
    if staging.is_symlink():
        staging.unlink()
    with locked(staging, folder):
        try:
            _empty(staging)
            with disk_errors():
                yield staging
            follow_umask(staging)
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
def staged_file(file: Path) -> Iterator[Path]:
    """Yield a path beside `file` to write to, and rename it to `file` after success.

    On any error it is removed. What a killed process left is written over by the next one. Raises
    UserError while another process writes the same file.
    """
    file = file.absolute()
    staging = file.with_name(f".{file.name}.partial")
    file.parent.mkdir(parents=True, exist_ok=True)
    if staging.is_symlink():
        staging.unlink()
    staging.touch()
    with held(staging, file):
        try:
            with disk_errors():
                yield staging
            fsync(staging)
            os.rename(staging, file)
            fsync(file.parent)
        except BaseException:
            staging.unlink(missing_ok=True)
            raise


@contextmanager
def locked(folder: Path, written: Path | None = None) -> Iterator[None]:
    """Make the folder if necessary, and hold its lock: see `held`."""
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder, written or folder):
        yield


@contextmanager
def held(path: Path, written: Path) -> Iterator[None]:
    """Hold the lock of a file or folder. Meanwhile, any other process that asks for this lock gets
    a UserError, which says that another process is writing to `written`.

    This is the system's lock on the path itself. It leaves no file behind, and it ends with its
    process, even if the process is killed. Without such locks (Windows, some network disks),
    nothing is locked.
    """
    if fcntl is None:
        yield
        return
    try:
        handle = _lock(path)
    except (BlockingIOError, FileNotFoundError):
        raise UserError(
            f"another process is writing to {written}: wait until it is done, or name another "
            "folder"
        ) from None
    try:
        yield
    finally:
        os.close(handle)


def _lock(path: Path) -> int:
    """An open descriptor with the lock. Raises BlockingIOError if another process has it, and
    FileNotFoundError if the path was replaced meanwhile."""
    handle = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError as error:
            logging.getLogger(__name__).debug("%s cannot be locked: %s", path, error)
        if not os.path.samestat(os.fstat(handle), os.stat(path)):
            raise FileNotFoundError(path)
    except BaseException:
        os.close(handle)
        raise
    return handle


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextmanager
def disk_errors() -> Iterator[None]:
    """Turn the errors of safetensors and torch for a full disk into an OSError."""
    try:
        yield
    except (OSError, UserError):
        raise
    except BaseException as error:  # torch.distributed.checkpoint's own is not an Exception
        if number := re.search(r"(?:os error|\[Errno) (\d+)", str(error)):
            code, reason = int(number[1]), os.strerror(int(number[1]))
        elif any(name in str(error) for name in _TORCH_WRITER):
            code, reason = errno.EIO, "a file cannot be written completely: the disk may be full"
        else:
            raise
        raise OSError(code, reason) from error


def fingerprint(files: Iterable[str | Path]) -> str:
    """A fast digest of files: names, sizes and samples (64 KB at 16 positions of each file).
    Training a model or rewriting a text changes every sample."""
    digest = hashlib.sha256()
    for path in map(Path, files):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            for place in range(SAMPLES):
                file.seek(place * max(0, size - SAMPLE_BYTES) // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def follow_umask(path: Path) -> None:
    """Give tensor files, one or all in a folder, the permissions of other new files: safetensors
    makes them readable by the owner only."""
    mask = os.umask(0o077)  # the only way to read it is to set it
    os.umask(mask)
    for file in path.rglob("*.safetensors") if path.is_dir() else (path,):
        with suppress(PermissionError):  # some file systems have no permissions
            file.chmod(0o666 & ~mask)


def fsync(path: Path) -> None:
    """Force a file or a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_between(page: Path, name: str, text: str) -> None:
    """Replace the text of a page between `<!-- name -->` and `<!-- end of name -->`."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, rest = page.read_text(encoding="utf-8").split(begin)
    page.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}", encoding="utf-8")
