"""One training step, seen from inside: gradient, clipping, precision, dropout, schedule."""

import json

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from supra import testing
from supra.data.packing import collate, shifted_labels
from supra.uptrain import end_to_end, loop, tree
from supra.uptrain.data import BlockStream, training_documents
from tests.uptrain.texts import write_texts


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A student, a teacher that it differs from, and text."""
    folder = tmp_path_factory.mktemp("step")
    testing.tiny_checkpoint(folder / "teacher")
    testing.tiny_checkpoint(folder / "student", seed=1)
    write_texts(folder / "text.jsonl", 20)
    return folder


@pytest.fixture
def run_of(files, tmp_path, monkeypatch):
    """A function that makes runs with two micro-batches per step, before their first step."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    runs = []

    def make(**changes):
        distill = {"next_token": 0.1, "schedule": {"warmup": 2}, "optimizer": {"lr": 1e-3}}
        values = {
            "student": str(files / "student"),
            "teacher": str(files / "teacher"),
            "out": str(tmp_path / f"run{len(runs)}"),
            "distill": distill | changes.pop("distill", {}),
            "data": {"path": str(files / "text.jsonl"), "sequence_length": 32},
            "budget": {"tokens": 12 * 128},
            "batch": {"size": 2, "accumulation": 2},
            "precision": "fp32",
        }
        runs.append(loop.Run(tree.build(values | changes)))
        return runs[-1]

    yield make
    for run in runs:
        run.close()


def logged(run, key):
    return json.loads((run.folder.path / "log.jsonl").read_text())[key]


def test_the_gradient_is_that_of_the_formula(run_of, files):
    run = run_of(distill={"kl": 0.3, "next_token": 0.7, "temperature": 2.0})
    run.train_step()

    student, teacher = (
        AutoModelForCausalLM.from_pretrained(files / name, dtype=torch.float64)
        for name in ("student", "teacher")
    )
    tokenizer = AutoTokenizer.from_pretrained(files / "student")
    stream = BlockStream(*training_documents(run.config), tokenizer, 32)
    batch = collate(next(stream) for _ in range(4))
    labels = shifted_labels(batch.pop("labels"))
    valid = labels != -100
    logits = student(**batch, use_cache=False).logits[valid]
    with torch.no_grad():
        log_p = (teacher(**batch, use_cache=False).logits[valid] / 2).log_softmax(-1)
    next_token = torch.nn.functional.cross_entropy(logits, labels[valid])
    log_q = (logits / 2).log_softmax(-1)
    kl = 4 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    (0.7 * next_token + 0.3 * kl).backward()
    norm = torch.nn.utils.get_total_norm([weight.grad for weight in student.parameters()])
    expected = {"next_token": next_token, "kl": kl, "grad_norm": norm}
    for name, value in expected.items():
        assert logged(run, name) == pytest.approx(value.item(), rel=1e-6), name


@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_the_gradient_is_clipped(run_of, monkeypatch, clip):
    run, norms = run_of(distill={"optimizer": {"lr": 1e-3, "clip": clip}}), []

    def step():
        gradients = [weight.grad for weight in run.model.parameters()]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())

    monkeypatch.setattr(run.optimizer, "step", step)
    run.train_step()
    before = logged(run, "grad_norm")
    assert before > 0.1 and norms == [pytest.approx(clip or before, rel=1e-3)]


@pytest.mark.parametrize(("checkpointing", "passes"), [(False, 2), (True, 4)])
def test_gradient_checkpointing_computes_twice(run_of, checkpointing, passes):
    run, calls = run_of(gradient_checkpointing=checkpointing), []
    run.model.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    run.train_step()
    assert len(calls) == passes, "two micro-batches"


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)]
)
def test_logits_have_the_precision(run_of, monkeypatch, precision, dtype):
    dtypes, token_losses = set(), end_to_end.token_losses

    def recorded(logits, labels, teacher_logits, **options):
        dtypes.update((logits.dtype, teacher_logits.dtype))
        return token_losses(logits, labels, teacher_logits, **options)

    monkeypatch.setattr(end_to_end, "token_losses", recorded)
    run = run_of(precision=precision)
    run.train_step()
    assert dtypes == {dtype}
    assert {weight.dtype for weight in run.model.parameters()} == {torch.float32}


def test_the_teacher_has_no_dropout(run_of, tmp_path):
    testing.tiny_checkpoint(tmp_path / "teacher", attention_dropout=0.5)
    divergences = []
    for changes in ({}, {"teacher": str(tmp_path / "teacher")}):
        run = run_of(**changes)
        run.train_step()
        divergences.append(logged(run, "kl"))
    assert divergences[0] == divergences[1]


def test_the_schedule_reaches_the_optimizer(run_of):
    run = run_of()
    run.train_step()
    (group, *_) = run.optimizer.optimizer.param_groups
    assert group["lr"] == logged(run, "lr") == pytest.approx(1e-3 / 3)
