"""The recipe as a user starts it: exit codes, messages, launchers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from supra import testing
from supra.losses import token_losses
from supra.packing import collate, shifted_labels
from supra.uptrain.data import BlockStream, Documents, open_dataset

ROOT = Path(__file__).parents[1]
CONFIG = "--config=recipes/configs/smoke.yaml"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("command")
    testing.tiny_checkpoint(folder / "student")
    with open(folder / "text.jsonl", "w") as file:
        for number in range(20):
            text = f"The river rises {number} times. " * (9 - number % 7)
            print(json.dumps({"text": text}), file=file)
    return folder


def run(*arguments, launcher=(), **environment):
    command = [sys.executable, *launcher, "recipes/uptrain.py", CONFIG, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )


def settings(files, out):
    return f"student={files}/student", f"data.path={files}/text.jsonl", f"out={out}"


def test_a_mistake_is_one_line_and_exit_code_2():
    result = run("optimizer.lrr=1")
    assert result.returncode == 2
    assert result.stderr.startswith("supra: error: unknown key optimizer.lrr: did you mean")
    assert result.stderr.count("\n") == 1 and result.stdout == ""


def test_smoke_recipe_under_accelerate_launch(files, tmp_path):
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes=1")
    result = run(*settings(files, tmp_path / "run"), launcher=launcher)
    assert result.returncode == 0, result.stderr
    assert f"supra: done: {tmp_path}/run/final" in result.stderr
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")


def test_two_processes_are_one_big_batch(files, tmp_path):
    """Loss and gradient are means over all tokens; the processes have different numbers of them."""
    # accelerate launch starts one process on a CPU, whatever --num_processes says
    result = run(
        *settings(files, tmp_path / "run"),
        "precision=fp32",
        "budget.tokens=1",
        "batch.size=1",
        "batch.accumulation=2",
        "data.eval_documents=0",
        "eval.every=0",
        launcher=("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"),
        ACCELERATE_USE_CPU="true",
    )
    assert result.returncode == 0, result.stderr
    logged = json.loads((tmp_path / "run" / "log.jsonl").read_text())

    model = AutoModelForCausalLM.from_pretrained(files / "student")
    tokenizer = testing.tiny_tokenizer(tmp_path)
    documents = Documents(open_dataset(f"{files}/text.jsonl"), "text", seed=0)
    streams = [BlockStream(documents, tokenizer, 128, rank=rank, world=2) for rank in (0, 1)]
    batch = collate(next(stream) for stream in streams for _ in range(2))
    labels = shifted_labels(batch.pop("labels")).flatten()
    losses = token_losses(model(**batch, use_cache=False).logits.flatten(0, 1), labels)
    loss = losses.total / (labels != -100).sum()
    loss.backward()
    norm = torch.nn.utils.get_total_norm([weight.grad for weight in model.parameters()])
    assert logged["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert logged["grad_norm"] == pytest.approx(norm.item(), rel=1e-6)
