"""What a run reads beside its config, by fingerprint: a checkpoint goes on with the same alone."""

from pathlib import Path
from typing import Any

from supra.checkpoints import find_checkpoint
from supra.files import fingerprint
from supra.text import local_files
from supra.uptrain.config import UptrainConfig

ORIGIN = "origin.json"  # in a checkpoint


def origin(config: UptrainConfig, dataset: Any) -> dict[str, str]:
    """A fingerprint each of the student, its tokenizer, the teacher and the text, which `dataset`
    is when it is read."""
    student = find_checkpoint(config.student)
    found = {"student": student.fingerprint(), "tokenizer": student.tokenizer_fingerprint()}
    if config.distill:
        found["teacher"] = find_checkpoint(config.teacher).fingerprint()
    return found | {"text": _text(config, dataset)}


def _text(config: UptrainConfig, dataset: Any) -> str:
    """Of local files sizes and samples. Of the hub the name, and the commit, with which `datasets`
    names the folder of its copy; a stream has none."""
    data = config.data
    if files := local_files(data.path):
        return fingerprint(files)
    copies = getattr(dataset, "cache_files", ())
    commits = sorted({Path(copy["filename"]).parent.name for copy in copies})
    return " ".join([data.path, str(data.name), data.split, *commits])
