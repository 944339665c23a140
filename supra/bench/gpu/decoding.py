"""The time that a model takes for a token of every row, at a length of context."""

from pathlib import Path
from typing import Any

import torch

from supra.bench import decode
from supra.bench.gpu.models import TEACHER, Sizes, model


def measure(
    folder: Path, name: str, batch: int, length: int, sizes: Sizes, device: str
) -> dict[str, Any]:
    """In transformers, eagerly, in bfloat16."""
    role = decode.TEACHER if name == TEACHER else decode.STUDENT
    job = decode.Job(
        decode.TRANSFORMERS, role, str(model(folder, name, sizes)), "bfloat16", length,
        sizes.decoded, torch.get_num_threads(), batch=batch, device=device,
    )  # fmt: skip
    found = decode.measure(job)
    return {
        "ms": 1e3 * found.seconds,
        "tokens_per_second": batch / found.seconds,
        "state_mb": found.state / 1e6,
        "peak_gb": found.peak / 1e9,
    }
