"""The recipe as a user starts it: exit codes, messages, launchers."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM

from supra import testing
from supra.conversion.convert import convert
from supra.data.packing import collate, shifted_labels
from supra.losses.chunked import ScoredModel
from supra.losses.token_losses import token_losses
from supra.model.original import original
from supra.uptrain.align import LayerByLayer
from supra.uptrain.data import BlockStream, Documents, open_dataset
from supra.uptrain.end_to_end import EndToEnd
from supra.uptrain.initial_state import InitialState
from supra.uptrain.stage_settings import AlignConfig, ExtendConfig, OptimizerConfig
from tests.uptrain.texts import write_texts

ROOT = Path(__file__).parents[2]
CONFIG = "--config=recipes/configs/smoke.yaml"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("command")
    testing.tiny_checkpoint(folder / "student")
    write_texts(folder / "text.jsonl", 20)
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
    result = run("tune.optimizer.lrr=1")
    assert result.returncode == 2
    assert result.stderr.startswith("supra: error: unknown key tune.optimizer.lrr: did you mean")
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
        "budget={}",
        "tune={tokens: 1}",
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


def test_two_processes_align_as_one(files, tmp_path):
    """Layers learn from all rows of all processes, whose weights stay the same; then a wrapped
    stage trains what the layers did not."""
    convert(f"{files}/student", tmp_path / "student", mixer="supra")
    result = run(
        *settings(files, tmp_path / "run"),
        f"student={tmp_path}/student",
        "precision=fp32",
        "budget={}",
        "align={tokens: 1}",
        "tune={tokens: 1, optimizer: {lr: 1.0e-3, attention_lr: 0, new_lr: 0}}",
        "batch.size=1",
        "batch.accumulation=2",
        "data.eval_documents=0",
        "eval.every=0",
        launcher=("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"),
        ACCELERATE_USE_CPU="true",
    )
    assert result.returncode == 0, result.stderr
    logged, tuned = map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines())
    assert (logged["stage"], tuned["stage"]) == ("align", "tune")

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    layers = original(model, own_attention=True)
    tokenizer = testing.tiny_tokenizer(tmp_path)
    documents = Documents(open_dataset(f"{files}/text.jsonl"), "text", seed=0)
    streams = [BlockStream(documents, tokenizer, 128, rank=rank, world=2) for rank in (0, 1)]
    batches = [collate([next(stream)]) for stream in streams for _ in range(2)]
    objective = LayerByLayer(Accelerator(cpu=True), *layers, AlignConfig(), nullcontext)
    expected = objective.add_gradients(batches)
    for name, value in expected.items():
        assert logged[name] == pytest.approx(value, rel=1e-5), name


def test_two_processes_extend_as_one(files, tmp_path):
    """Rows in segments, of each process's own documents; carried states are each one's own, too."""
    convert(f"{files}/student", tmp_path / "student", mixer="supra")
    result = run(
        *settings(files, tmp_path / "run"),
        f"student={tmp_path}/student",
        "precision=fp32",
        "data.sequence_length=16",
        "budget={}",
        "tune=null",
        "extend={tokens: 512, state_passing: 4, initial_state: carried, optimizer: {lr: 1.0e-9}}",
        "batch.size=1",
        "batch.accumulation=2",
        "data.eval_documents=0",
        "eval.every=0",
        launcher=("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"),
        ACCELERATE_USE_CPU="true",
    )
    assert result.returncode == 0, result.stderr
    logged = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").open()]
    assert [line["tokens"] for line in logged] == [256, 512]

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "student").train()
    tokenizer = testing.tiny_tokenizer(tmp_path)
    documents = Documents(open_dataset(f"{files}/text.jsonl"), "text", seed=0)
    streams = [
        BlockStream(documents, tokenizer, 16, rank=rank, world=2, segments=4) for rank in (0, 1)
    ]
    stage = ExtendConfig(state_passing=4, optimizer=OptimizerConfig(clip=0.0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.param_groups[0]["base_lr"] = 1.0
    objective = EndToEnd(
        Accelerator(cpu=True), ScoredModel(model), optimizer, stage, None, nullcontext,
        InitialState("carried", model, seed=0),
    )  # fmt: skip
    for line in logged:
        batches = [collate([next(stream)]) for stream in streams for _ in range(2)]
        expected = objective.add_gradients(batches)
        model.zero_grad()
        for name in ("loss", "grad_norm"):
            assert line[name] == pytest.approx(expected[name], rel=2e-6), name
