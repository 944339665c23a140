"""Fingerprints of what a run reads besides its config; resuming requires the same ones."""

from pathlib import Path
from typing import Any

from supra.checkpoint.files import fingerprint
from supra.checkpoint.opening import find_checkpoint
from supra.data.text import local_files
from supra.uptrain.config import UptrainConfig

ORIGIN = "origin.json"  # in a checkpoint


def origin(config: UptrainConfig, dataset: Any) -> dict[str, str]:
    """Fingerprints of the student, its tokenizer, the teacher and the text. `dataset` is the opened
    text."""
    student = find_checkpoint(config.student)
    found = {"student": student.fingerprint(), "tokenizer": student.tokenizer_fingerprint()}
    if config.distill:
        found["teacher"] = find_checkpoint(config.teacher).fingerprint()
    return found | {"text": _text(config, dataset)}


def _text(config: UptrainConfig, dataset: Any) -> str:
    """For local files, a fingerprint of their sizes and samples. For a data set on the hub, its
    name and commit, which is the folder name of the local copy; a stream has no copy, so its name
    only."""
    data = config.data
    if files := local_files(data.path):
        return fingerprint(files)
    copies = getattr(dataset, "cache_files", ())
    commits = sorted({Path(copy["filename"]).parent.name for copy in copies})
    return " ".join([data.path, str(data.name), data.split, *commits])
