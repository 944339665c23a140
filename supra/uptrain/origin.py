"""Fingerprints of what a run reads besides its config; resuming requires the same ones."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from supra.checkpoint.files import fingerprint
from supra.checkpoint.opening import find_checkpoint
from supra.data.text import local_files
from supra.uptrain.config import UptrainConfig
from supra.uptrain.data_settings import SourceConfig

ORIGIN = "origin.json"  # in a checkpoint


def origin(config: UptrainConfig, datasets: Sequence[Any]) -> dict[str, str]:
    """Fingerprints of the student, its tokenizer, the teacher and the text. `datasets` are the
    opened training texts."""
    student = find_checkpoint(config.student)
    found = {"student": student.fingerprint(), "tokenizer": student.tokenizer_fingerprint()}
    if config.distill:
        found["teacher"] = find_checkpoint(config.teacher).fingerprint()
    texts = map(_text, config.data.read, datasets)
    return found | {"text": "; ".join(texts)}


def _text(text: SourceConfig, dataset: Any) -> str:
    """For local files, a fingerprint of their sizes and samples. For a data set on the hub, its
    name and commit, which is the folder name of the local copy; a stream has no copy, so its name
    only."""
    if files := local_files(text.path):
        return fingerprint(files)
    copies = getattr(dataset, "cache_files", ())
    commits = sorted({Path(copy["filename"]).parent.name for copy in copies})
    return " ".join([text.path, str(text.name), text.split, *commits])
