"""A list of a checkpoint's files with sizes and checksums, by which damage is found."""

import json
import re
import zipfile
import zlib
from pathlib import Path

from supra.uptrain.origin import ORIGIN

MANIFEST = "manifest.json"
CHUNK = 2**22  # bytes read at a time


def write_manifest(folder: Path) -> None:
    """Write the list of a checkpoint's files. Call it after all files are written."""
    files = {
        path.relative_to(folder).as_posix(): _facts(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")


def listed_files(folder: Path) -> bool:
    """Whether a checkpoint should have this list; checkpoints of earlier versions have none."""
    return (folder / MANIFEST).exists() or (folder / ORIGIN).exists()


def damage(folder: Path) -> str | None:
    """A message about the first damaged file of a checkpoint; None if there is none."""
    if not listed_files(folder):
        return _damage_unlisted(folder)
    if not (folder / MANIFEST).is_file():
        return f"{MANIFEST} is missing"
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        listed = {name: (facts["bytes"], facts["crc32"]) for name, facts in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST} is damaged"
    for name, (size, _) in listed.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (found := (folder / name).stat().st_size) != size:
            return f"{name} has {found} bytes instead of {size}"
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        # hidden files are the system's, such as .DS_Store
        if path.is_file() and name not in {*listed, MANIFEST} and not path.name.startswith("."):
            return f"{name} does not belong to this checkpoint"
    for name, (_, crc32) in listed.items():
        if _crc32(folder / name) != crc32:
            return f"{name} has changed since it was written: its checksum differs"
    return None


def _damage_unlisted(folder: Path) -> str | None:
    """The same for a checkpoint of an earlier version, as far as possible without a list."""
    # every process wrote two files
    numbered = re.compile(r"(?:data-|random_states_)(\d+)\.\w+")
    numbers = (numbered.fullmatch(path.name) for path in folder.iterdir())
    for rank in sorted({found[1] for found in numbers if found} or {"0"}):
        for name in (f"random_states_{rank}.pkl", f"data-{rank}.json"):
            if not (folder / name).is_file():
                return f"{name} is missing"
    for path in (*folder.glob("*.pkl"), *folder.glob("*.bin")):
        try:  # torch's files are archives, with a checksum of each part
            with zipfile.ZipFile(path) as archive:
                whole = archive.testzip() is None
        except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError):
            whole = False
        if not whole:
            return f"{path.name} is truncated or damaged"
    return None


def _facts(path: Path) -> dict[str, int]:
    return {"bytes": path.stat().st_size, "crc32": _crc32(path)}


def _crc32(path: Path) -> int:
    """It finds damage by disks and copies, at 4 GB/s, but does not stop deliberate changes."""
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    return checksum
