"""Checksums of the tensors that were written, in conversion.json; `supra inspect --verify`."""

import json
import zlib
from pathlib import Path

import torch
from torch import Tensor

from supra.checkpoint.conversion_report import REPORT
from supra.checkpoint.json_files import read_fields
from supra.checkpoint.weights import FolderReader
from supra.errors import UserError


def checksum(tensor: Tensor) -> str:
    """CRC-32 of dtype, shape and bytes. It finds damage, but does not stop deliberate changes."""
    start = zlib.crc32(f"{tensor.dtype} {list(tensor.shape)}".encode())
    data = tensor.contiguous().flatten().view(torch.uint8).numpy()
    return f"{zlib.crc32(data, start):08x}"


def record_checksums(folder: Path) -> list[str]:
    """Write the checksums of the tensors in `folder` into its conversion.json, if it has one.

    They replace the checksums of the folder that the file was copied from. Returns a message if the
    file is damaged; it is then replaced by one with checksums only.
    """
    if not (folder / REPORT).is_file():
        return []
    report, lines = {}, []
    try:
        report = read_fields(folder / REPORT)
    except UserError as error:  # a damaged report must not cost a trained model
        lines = [f"{error}; the copy has checksums only, without the report of the conversion"]
    report["checksums"] = _of_folder(folder)
    (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return lines


def verify(folder: Path) -> int:
    """Compare every tensor in `folder` with its checksum, and return how many there are.

    Raises UserError if one differs, or if the folder has no checksums.
    """
    expected = None
    if (folder / REPORT).exists():
        expected = read_fields(folder / REPORT).get("checksums")
    if not isinstance(expected, dict) or not expected:
        raise UserError(
            f"--verify: {folder.name} has no checksums in {REPORT}: convert the model again with "
            "this version of supra, which writes them"
        )
    found = _of_folder(folder)
    changed = sorted(name for name in expected if found.get(name) != expected[name])
    changed += sorted(found.keys() - expected.keys())
    if changed:
        raise UserError(
            f"{len(changed)} of {len(expected)} tensors of {folder.name} changed since they were "
            f"written, first {changed[0]}: copy or convert the model again"
        )
    return len(expected)


def _of_folder(folder: Path) -> dict[str, str]:
    reader = FolderReader(folder)
    return {name: checksum(reader.load(name)) for name in reader.specs}
