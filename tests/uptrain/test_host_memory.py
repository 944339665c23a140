"""How much memory each process takes while a student is loaded under FSDP.

`python -m tests.uptrain.test_host_memory --gigabytes 3 --ranks 4` prints the peak of every process.
"""

import argparse
import json
import math
import os
import tempfile
from pathlib import Path

import pytest
import torch

from supra.checkpoint.opening import find_checkpoint
from supra.conversion.convert import convert
from supra.testing import tiny_checkpoint, tiny_tokenizer
from supra.uptrain import load_config
from tests.cpu_rank import shard_on_cpus
from tests.uptrain.test_launch import LAUNCH, launched, run_ranks

LAYER = {  # 8.9 million parameters, 36 MB
    "hidden_size": 1024,
    "intermediate_size": 1536,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 64,
}
SPARE = 2**30  # bytes of a process besides its part


def student(folder: Path, gigabytes: float) -> Path:
    """A converted model whose float32 weights take about this much."""
    layers = max(2, math.ceil(gigabytes * 1e9 / 36e6))
    tiny_checkpoint(folder / "base", num_hidden_layers=layers, **LAYER)
    tiny_tokenizer(folder / "base")
    convert(str(folder / "base"), folder / "student", mixer="mamba2")
    return folder / "student"


def measure(folder: Path, gigabytes: float, ranks: int) -> list[int]:
    """The most bytes that each process takes more than before it loads the student."""
    made = student(folder, gigabytes)
    environment = launched(LAUNCH / "fsdp.yaml", f"--num_processes={ranks}")
    arguments = [str(made), str(folder)]
    assert run_ranks(arguments, environment, ranks, target=load_and_split) == [0] * ranks
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


def load_and_split(arguments: list[str], environment: dict[str, str]) -> None:
    """One process: load and prepare the student, and write the peak to a file."""
    os.environ.update(environment)
    shard_on_cpus()
    from supra.losses.chunked import ScoredModel
    from supra.uptrain import models, spread
    from supra.uptrain.accelerator import open_accelerator

    name, folder = arguments
    config = load_config("smoke", [f"student={name}", "data.path=none", f"out={folder}"])
    accelerator = open_accelerator(config, Path(folder))
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    model = spread.load(accelerator, find_checkpoint(name), models.DTYPE).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    spread.prepare(accelerator, ScoredModel(model), optimizer)
    peak = resident("VmHWM") - before
    (Path(folder) / f"{accelerator.process_index}.json").write_text(json.dumps(peak))


def resident(field: str) -> int:
    """Bytes of this process in memory: now (VmRSS), or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


@pytest.mark.long  # four processes
def test_one_process_holds_the_whole_student(tmp_path):
    gigabytes, ranks = 0.5, 4
    first, *others = measure(tmp_path, gigabytes, ranks)
    weights = (tmp_path / "student" / "model.safetensors").stat().st_size
    assert first > weights  # else nothing has been measured
    assert max(others) < weights / 2 and max(others) < weights / ranks + SPARE


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=3.0, help="of the student's weights")
    parser.add_argument("--ranks", type=int, default=4)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        for rank, peak in enumerate(measure(Path(name), given.gigabytes, given.ranks)):
            print(f"process {rank}: {peak / 1e9:.2f} GB")
