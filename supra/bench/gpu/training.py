"""The speed of training, of random models."""

import tempfile
from pathlib import Path
from typing import Any

from supra.bench.gpu.models import TEACHER, Sizes, model, text
from supra.bench.train import measure as training
from supra.uptrain.config import UptrainConfig

STAGES = ("align", "distill", "tune")


def measure(folder: Path, mixer: str, stage: str, sizes: Sizes, device: str) -> dict[str, Any]:
    """Tokens per second of the steps after the first ones, and the share of the GPU's peak."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        config = _config(folder, mixer, stage, sizes, out)
        return training.measure(config, sizes.warm_up, sizes.steps, device)


def _config(folder: Path, mixer: str, stage: str, sizes: Sizes, out: str) -> UptrainConfig:
    tokens = sizes.rows * sizes.length * (sizes.warm_up + sizes.steps + 1)
    return UptrainConfig(
        student=str(model(folder, mixer, sizes)),
        teacher=str(model(folder, TEACHER, sizes)) if stage == "distill" else None,
        out=out,
        data={
            "path": str(text(folder, sizes)),
            "sequence_length": sizes.length,
            "eval_documents": 0,
        },
        batch={"size": sizes.rows},
        **{stage: {"tokens": tokens}},
    )
