"""The arithmetic of memory against what processes take that train a 100M on CPUs.

`python -m tests.planning.test_real_memory --launch ddp --stage tune` prints both.
"""

import argparse
import ctypes
import json
import os
import random
import tempfile
from pathlib import Path

import pytest
import torch.distributed as dist

from supra.checkpoint.opening import find_checkpoint
from supra.conversion.convert import convert
from supra.planning.hardware import Gpus, Hardware
from supra.planning.measure import Models, measure
from supra.planning.memory import Pass, end_to_end, layer_by_layer
from supra.testing import tiny_checkpoint, tiny_tokenizer
from supra.uptrain import load_config
from tests.cpu_rank import shard_on_cpus
from tests.ranks import on_ranks
from tests.uptrain.test_host_memory import resident
from tests.uptrain.test_launch import LAUNCH, ROOT, launched

SIZES = {  # 98 million parameters
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 64,
    "vocab_size": 8192,
}
M_MMAP_THRESHOLD = -3  # malloc.h
RANKS, ROWS, LENGTH, STEPS = 2, 2, 128, 2  # the optimizer has its moments in the second step


def settings(folder: Path, stage: str) -> list[str]:
    return [
        f"student={folder}/student",
        f"data={{path: {folder}/text.jsonl, sequence_length: {LENGTH}, eval_documents: 0}}",
        f"out={folder}/run",
        "eval.every=0",
        f"budget.tokens={STEPS * RANKS * ROWS * LENGTH}",
        "calibrate.tokens=0",
        "precision=fp32",
        f"batch={{size: {ROWS}, accumulation: 1}}",
        *(f"{x}={'{share: 1.0}' if x == stage else 'null'}" for x in ("align", "distill", "tune")),
    ]


def compare(folder: Path, launch: str, stage: str) -> tuple[float, list[float]]:
    """Bytes of a process: planned, and taken by each."""
    tiny_checkpoint(folder / "base", **SIZES)
    tiny_tokenizer(folder / "base")
    convert(str(folder / "base"), folder / "student", mixer="mamba2")
    letters = random.Random(0)
    with open(folder / "text.jsonl", "w") as file:
        for _ in range(STEPS * RANKS * ROWS):
            print(json.dumps({"text": "".join(letters.choices("JKQVXYZ", k=LENGTH))}), file=file)
    environment = launched(LAUNCH / f"{launch}.yaml", f"--num_processes={RANKS}")
    given = train_and_measure, RANKS, folder, settings(folder, stage), environment
    on_ranks(*given, start_method="spawn")  # a fork would use memory again that this process freed
    taken = [json.loads((folder / f"run/peak{rank}.json").read_text()) for rank in range(RANKS)]
    return planned(folder, launch, stage), taken


def planned(folder: Path, launch: str, stage: str) -> float:
    hardware = Hardware(Gpus(RANKS, 16), 1, launch)
    config = load_config(ROOT / "recipes/configs/smoke.yaml", settings(folder, stage))
    student = find_checkpoint(config.student).config()
    sizes = measure(Models(student, None), config, stage, hardware).sizes
    run = Pass(
        rows=ROWS,
        length=LENGTH,
        width=4,
        hardware=hardware,
        accumulates=False,
        checkpointing=False,
        learns_from="outputs" if stage == "align" else "text",
        device="cpu",
    )
    return (layer_by_layer if stage == "align" else end_to_end)(sizes, run).peak


def train_and_measure(arguments: list[str], environment: dict[str, str]) -> None:
    """One process: train, and write the most bytes that it took more than before it loaded."""
    rank = str(dist.get_rank())
    given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(RANKS)}
    # the group is there already, and accelerate only wants to see an address
    given |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "ACCELERATE_USE_CPU": "true"}
    os.environ.update(environment | given)
    shard_on_cpus()
    from supra.uptrain import loop

    # every tensor is mapped by itself and unmapped when it is freed: no holes between them count
    loop.keep_freed_memory = lambda: ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)
    before = resident("VmRSS")
    config = load_config(ROOT / "recipes/configs/smoke.yaml", arguments)
    run = loop.Run(config)
    Path("/proc/self/clear_refs").write_text("5")  # the first process had the whole student
    for _ in range(STEPS):
        run.train_step()
    peak = resident("VmHWM") - before
    (Path(config.out) / f"peak{rank}.json").write_text(json.dumps(peak))


@pytest.mark.long  # two processes that train 98 million parameters
@pytest.mark.parametrize("launch", ["ddp", "fsdp"])
@pytest.mark.parametrize("stage", ["align", "tune"])
def test_processes_take_what_is_planned(tmp_path, launch, stage):
    expected, taken = compare(tmp_path, launch, stage)
    assert max(taken) == pytest.approx(expected, rel=0.1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--launch", choices=["ddp", "fsdp"], default="ddp")
    parser.add_argument("--stage", choices=["align", "tune"], default="tune")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        expected, taken = compare(Path(name), given.launch, given.stage)
    print(f"planned: {expected / 1e9:.2f} GB")
    for rank, size in enumerate(taken):
        print(f"process {rank}: {size / 1e9:.2f} GB")
