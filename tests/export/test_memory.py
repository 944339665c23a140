"""The memory of an export is a shard and a layer, not the model."""

import ctypes
import multiprocessing
import threading
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from supra.conversion.convert import convert
from supra.export import lent_weights
from supra.export.export import export
from supra.testing import tiny_config

STATUS = Path("/proc/self/status")
SIZES = {"hidden_size": 256, "intermediate_size": 2048, "num_attention_heads": 4, "head_dim": 64,
         "num_key_value_heads": 2, "num_hidden_layers": 12}  # fmt: skip
SHARD = 8e6
M_MMAP_THRESHOLD = -3  # of malloc.h


def own_bytes() -> int:
    """The memory of this process that is no file's."""
    line = next(x for x in STATUS.read_text().splitlines() if x.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


def measure(source: Path, out: Path, peak) -> None:
    """Export in this process, and note by how much its memory grew at most.

    Tensors of more than 64 KB go back to the system when they are freed. By default only those of
    more than 32 MB do, which these are too small for.
    """
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)
    before, done = own_bytes(), threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak.value = max(peak.value, own_bytes() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    export(source, out, to="qwen3_5", idle_attention=True, shard_bytes=SHARD)
    done.set()
    watcher.join()


@pytest.mark.skipif(not STATUS.exists(), reason="only Linux tells a process's memory in /proc")
def test_memory_is_bounded(tmp_path, monkeypatch):
    model = AutoModelForCausalLM.from_config(tiny_config(**SIZES))
    model.save_pretrained(tmp_path / "base")
    size = sum(x.nbytes for x in model.parameters())
    del model
    convert(tmp_path / "base", tmp_path / "rnn", export_ready="qwen3_5", shard_bytes=SHARD)
    monkeypatch.setattr(lent_weights, "HELD_BYTES", 0)
    fork = multiprocessing.get_context("fork")
    peak = fork.Value("q", 0)
    process = fork.Process(target=measure, args=(tmp_path / "rnn", tmp_path / "out", peak))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert size > 80e6
    assert peak.value < SHARD + 30e6
