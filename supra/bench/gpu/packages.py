"""Rivals from wheels in a folder, without a package manager or a network."""

import zipfile
from pathlib import Path

from supra.errors import UserError


def unpack(wheels: Path, folder: Path) -> list[Path]:
    """Where Python finds the packages of a folder: the folder itself, as `pip install --target`
    leaves it, and every wheel in it, unpacked into `folder`. Raises UserError."""
    if not wheels.is_dir():
        raise UserError(f"--rivals (={wheels}) is no folder: name one with wheels")
    found = [wheels.resolve()]
    for wheel in sorted(wheels.glob("*.whl")):
        place = folder.resolve() / wheel.stem
        if not place.exists():
            _extract(wheel, place)
        found.append(place)
    return found


def _extract(wheel: Path, place: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as file:
            staging = place.with_name(place.name + ".new")
            file.extractall(staging)
    except zipfile.BadZipFile as error:
        raise UserError(f"--rivals: {wheel.name} is damaged ({error}): download it again") from None
    staging.rename(place)
