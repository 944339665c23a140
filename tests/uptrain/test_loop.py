"""Whole training runs on tiny models: exact resume, accumulation, export, and errors."""

import json
import os
import random
import signal

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from supra import cli, testing
from supra.conversion.convert import convert
from supra.errors import UserError
from supra.evaluate import blocks_from_text, perplexity
from supra.uptrain import loop, tree
from supra.uptrain.end_to_end import EndToEnd
from supra.uptrain.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("one_thread", "own_cache")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A student, a teacher that it differs from, a hybrid of that teacher, and text."""
    folder = tmp_path_factory.mktemp("uptrain")
    testing.tiny_checkpoint(folder / "teacher")
    testing.tiny_checkpoint(folder / "student", seed=1, dtype="bfloat16")
    convert(str(folder / "teacher"), folder / "hybrid", mixer="supra", keep_attention=[0])
    words = [
        "the",
        "river",
        "rises",
        "in",
        "the",
        "hills",
        "and",
        "runs",
        "south",
        "to",
        "the",
        "sea",
    ]
    generator = random.Random(0)
    with open(folder / "text.jsonl", "w") as file:
        for _ in range(40):
            text = " ".join(generator.choices(words, k=generator.randint(5, 60)))
            print(json.dumps({"text": text}), file=file)
    return folder


def config(files, out, **changes):
    values = {
        "student": str(files / "student"),
        "teacher": str(files / "teacher"),
        "out": str(out),
        "data": {"path": str(files / "text.jsonl"), "sequence_length": 32},
        "budget": {"tokens": 12 * 128},
        "distill": {
            "next_token": 0.1,
            "optimizer": {"lr": 1e-3, "weight_decay": 0.1},
            "schedule": {"warmup": 0.2},
        },
        "batch": {"size": 2, "accumulation": 2},
        "precision": "fp32",
    }
    return tree.build(merged(values, changes))


def merged(values, changes):
    """Nested dicts with changes, which replace single values."""
    for key, value in changes.items():
        inner = isinstance(value, dict) and isinstance(values.get(key), dict)
        values = values | {key: merged(values[key], value) if inner else value}
    return values


def log(out, key="loss"):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


def weights(out):
    return load_file(out / "final" / "model.safetensors")


def interrupt_after(monkeypatch, step, number=signal.SIGTERM):
    train_step = loop.Run.train_step

    def interrupted(run):
        if run.step == step - 1:
            os.kill(os.getpid(), number)
        train_step(run)

    monkeypatch.setattr(loop.Run, "train_step", interrupted)


def assert_same_weights(left, right):
    left, right = weights(left), weights(right)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(
    ("student", "changes", "number"),
    [
        ("student", {"precision": "bf16"}, signal.SIGUSR1),
        ("student", {"data": {"streaming": True, "workers": 2}}, signal.SIGINT),
        ("student", {"lora": {"rank": 2, "dropout": 0.5}}, signal.SIGTERM),
        (
            "hybrid",
            {"calibrate": {"tokens": 64}, "distill": {"optimizer": {"new_lr": 1e-2}}},
            signal.SIGTERM,
        ),
    ],
    ids=["bf16", "streaming", "lora_dropout", "calibrated_hybrid"],
)
def test_interrupted_is_unbroken(files, tmp_path, monkeypatch, capsys, student, changes, number):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    changes = changes | {"student": str(files / student)}
    assert loop.train(config(files, whole, **changes)) is True
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5, number)
        assert loop.train(config(files, broken, **changes)) is False
    said = capsys.readouterr().err
    assert "stopped after step 5 of 12" in said and "tok/s" in said, "a line and a bar"
    assert not (broken / "final").exists() and list(log(broken)) == [1, 2, 3, 4, 5]
    loop.train(config(files, broken, **changes))
    assert log(broken) == log(whole)
    assert_same_weights(whole, broken)


def test_a_killed_run_goes_on_from_its_last_checkpoint(files, tmp_path, monkeypatch):
    """Half a checkpoint and half a log line, which a power cut may leave, do no harm."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    changes = {"checkpoint": {"every": 2, "keep": 2}}
    loop.train(config(files, whole, **changes))
    assert [folder.name for folder in sorted((whole / "checkpoints").iterdir())] == [
        "step-00000010",
        "step-00000012",
    ]

    def crash(run):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        save = loop.Run.save
        patch.setattr(
            loop.Run, "save", lambda run, loss: crash(run) if run.step == 8 else save(run, loss)
        )
        with pytest.raises(KeyboardInterrupt):
            loop.train(config(files, broken, **changes))
    (broken / "checkpoints" / ".step-00000008.partial").mkdir()
    with open(broken / "log.jsonl", "a") as file:
        file.write('{"step": 9, "lo')
    loop.train(config(files, broken, **changes))
    assert log(broken) == log(whole)
    assert_same_weights(whole, broken)
    assert not list((broken / "checkpoints").glob(".*"))


def test_an_export_that_fails_is_done_again(files, tmp_path, monkeypatch):
    """Only the export is repeated, and no step."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    changes = {"checkpoint": {"every": 0}}
    loop.train(config(files, whole, **changes))

    def full(*arguments):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(loop.models, "export", full)
        with pytest.raises(OSError, match="no space"):
            loop.train(config(files, broken, **changes))
    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "train_step", full)
        assert loop.train(config(files, broken, **changes)) is True
    assert log(broken) == log(whole)
    assert_same_weights(whole, broken)


def test_a_run_that_is_stopped_has_an_exit_code(files, tmp_path, monkeypatch):
    settings = config(files, tmp_path / "run").model_dump(mode="json")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    interrupt_after(monkeypatch, 2)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["uptrain", "--config", str(tmp_path / "config.yaml")])
    assert stopped.value.code == 130


def test_rows_longer_than_learned_positions(files, tmp_path):
    testing.tiny_checkpoint(tmp_path / "gpt2", "gpt2")
    changes = {
        "student": str(tmp_path / "gpt2"),
        "data": {"sequence_length": 1024},
        "budget": {"tokens": 1024},
        "batch": {"size": 1, "accumulation": 1},
    }
    message = r"data.sequence_length \(=1024\): the model has learned 512 positions"
    with pytest.raises(UserError, match=message):
        loop.train(config(files, tmp_path / "run", **changes))


def test_a_run_killed_before_its_first_checkpoint_begins_anew(files, tmp_path, monkeypatch):
    out = tmp_path / "run"
    changes = {"data": {"eval_documents": 8}, "eval": {"tokens": 64}, "budget": {"tokens": 256}}
    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "train", lambda run, stop_requested: run.train_step())
        loop.train(config(files, out, **changes))
    assert list(log(out, "teacher_loss")) == [0] and list(log(out)) == [1]
    loop.train(config(files, out, **changes))
    lines = (out / "log.jsonl").read_text().splitlines()
    # teacher, student, two steps, student
    assert [json.loads(line)["step"] for line in lines] == [0, 0, 1, 2, 2]


def test_calibration_happens_once(files, tmp_path, monkeypatch):
    out, calls, calibrate = tmp_path / "run", [], loop.calibrate
    monkeypatch.setattr(
        loop, "calibrate", lambda *inputs, **options: calls.append(calibrate(*inputs, **options))
    )
    changes = {
        "student": str(files / "hybrid"),
        "calibrate": {"tokens": 64},
        "data": {"eval_documents": 8},
        "eval": {"tokens": 256},
    }
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        loop.train(config(files, out, **changes))
    loop.train(config(files, out, **changes))
    assert len(calls) == 1
    teacher, converted, calibrated = (
        log(out, f"{name}_perplexity") for name in ("teacher", "converted", "eval")
    )
    assert list(teacher) == list(converted) == [0] and list(calibrated) == [0, 12]
    assert teacher[0] != converted[0] != calibrated[0]


def test_a_mixer_that_must_be_calibrated_first(files, tmp_path):
    """Its gate is closed until then. A student whose gate is open goes on without."""
    options = {"mixer": "mamba2", "options": {"form": "granite"}}
    convert(str(files / "teacher"), tmp_path / "student", **options)
    changes = {"student": str(tmp_path / "student"), "budget": {"tokens": 256}}
    with pytest.raises(UserError, match="the mixer mamba2 gives 0 until it is calibrated"):
        loop.train(config(files, tmp_path / "run", **changes))
    loop.train(config(files, tmp_path / "run", calibrate={"tokens": 64}, **changes))
    changes["student"] = str(tmp_path / "run" / "final")
    assert loop.train(config(files, tmp_path / "again", **changes))


def test_home(files, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "files").symlink_to(files)
    data = {"path": "~/files/text.jsonl", "eval_path": "~/files/text.jsonl"}
    changes = {"student": "~/files/student", "teacher": "~/files/teacher", "data": data}
    loop.train(config(files, "~/run", budget={"tokens": 1}, **changes))
    assert weights(tmp_path / "run")


def test_accumulation_is_correct_by_tokens(files, tmp_path):
    """Rows have different numbers of documents, so means of means would differ."""
    logs = []
    for size, accumulation in ((4, 1), (1, 4)):
        out = tmp_path / f"{size}"
        loop.train(config(files, out, batch={"size": size, "accumulation": accumulation}))
        logs.append(out)
    for key in ("loss", "grad_norm"):
        one, four = (list(log(out, key).values()) for out in logs)
        assert one[0] == pytest.approx(four[0], rel=1e-6)
        assert one == pytest.approx(four, rel=1e-5)  # AdamW amplifies the rounding


def test_training_lowers_both_losses_and_exports(files, tmp_path):
    out = tmp_path / "run"
    changes = {
        "budget": {"tokens": 60 * 256},
        "distill": {"next_token": 1.0, "optimizer": {"lr": 1e-2}},
        "batch": {"size": 8, "accumulation": 1},
        "data": {"eval_documents": 8},
        "eval": {"every": 30, "tokens": 256},
        "gradient_checkpointing": True,
    }
    loop.train(config(files, out, **changes))
    next_token, kl = log(out, "next_token"), log(out, "kl")
    assert next_token[60] < 0.8 * next_token[1] and kl[60] < 0.8 * kl[1]
    evaluated = log(out, "eval_loss")
    assert list(evaluated) == [0, 30, 60] and evaluated[60] < evaluated[0]
    assert list(log(out, "teacher_perplexity")) == [0]
    memory = list(log(out, "memory_gb").values())
    assert len(memory) == 60 and memory == sorted(memory) and 0.05 < memory[-1] < 100

    model = AutoModelForCausalLM.from_pretrained(out / "final")
    assert model.dtype == torch.bfloat16 and model.config.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in weights(out).values()} == {torch.bfloat16}
    tokenizer = AutoTokenizer.from_pretrained(out / "final")
    lines = (files / "text.jsonl").read_text().splitlines()[:8]
    blocks = blocks_from_text(tokenizer, [json.loads(line)["text"] for line in lines], 32)[:8]
    exported = perplexity(model.float(), blocks).loss
    assert exported == pytest.approx(evaluated[60], rel=2e-3)  # bf16 rounding of the weights


def test_lora_is_merged(files, tmp_path):
    out = tmp_path / "run"
    loop.train(config(files, out, lora={"rank": 2, "targets": ["q_proj", "v_proj"]}))
    before = load_file(files / "student" / "model.safetensors")
    after = weights(out)
    assert before.keys() == after.keys()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {
        f"model.layers.{layer}.self_attn.{proj}_proj.weight" for layer in (0, 1) for proj in "qv"
    }


@pytest.mark.parametrize("changes", [{}, {"lora": {"rank": 2}}], ids=["full", "lora"])
def test_a_converted_model(files, tmp_path, changes):
    """New parameters train at their own rate, with LoRA too, and stay float32 in the export."""
    testing.tiny_checkpoint(tmp_path / "base", dtype="bfloat16")
    (tmp_path / "base" / "LICENSE").write_text("as you like")
    student, out = tmp_path / "student", tmp_path / "run"
    cli.main(["convert", "--model", str(tmp_path / "base"), "--out", str(student)])
    changes = {"student": str(student), "budget": {"tokens": 256}, **changes}
    optimizer = {"lr": 1e-3, "new_lr": 1e-2}
    loop.train(config(files, out, **changes, distill={"optimizer": optimizer}))
    before, after = load_file(student / "model.safetensors"), weights(out)
    assert before.keys() == after.keys()
    new = {name for name in after if ".mixer." in name}
    assert new and {after[name].dtype for name in new} == {torch.float32}
    assert {after[name].dtype for name in after.keys() - new} == {torch.bfloat16}
    moved = max((after[name] - before[name]).abs().max().item() for name in new)
    reports = [json.loads((x / "conversion.json").read_text()) for x in (out / "final", student)]
    assert reports[0].pop("checksums") != reports[1].pop("checksums")
    assert reports[0] == reports[1]
    for name in ("LICENSE", "generation_config.json", "modeling_supra.py"):
        assert (out / "final" / name).read_text() == (student / name).read_text(), name
    assert moved == pytest.approx(1e-2 + 0.1 * 1e-2, rel=0.1)  # AdamW's first two steps


def test_lora_targets_that_are_not_there(files, tmp_path):
    with pytest.raises(UserError, match=r"lora.targets \(=w_pack\)"):
        loop.train(config(files, tmp_path / "run", lora={"targets": ["w_pack"]}))


def test_a_loss_that_is_no_number_stops_the_run(files, tmp_path, monkeypatch):
    """The last checkpoint has good weights, and the same command can continue."""
    out = tmp_path / "run"
    add_gradients, steps = EndToEnd.add_gradients, iter(range(1, 12))

    def poisoned(objective, batches):
        values = add_gradients(objective, batches)
        return values | {"loss": values["loss"] * (torch.nan if next(steps) == 4 else 1)}

    with monkeypatch.context() as patch:
        patch.setattr(EndToEnd, "add_gradients", poisoned)
        with pytest.raises(
            UserError,
            match=r"step 4: the loss is nan .* Lower distill.optimizer.lr .* "
            "--accept-changed then continues from step-00000003",
        ):
            loop.train(config(files, out, checkpoint={"every": 1}))
    assert RunFolder(out).last_checkpoint().name == "step-00000003"
    assert list(log(out)) == [1, 2, 3]


def test_folders_of_other_runs_are_refused(files, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        loop.train(config(files, out))
    with pytest.raises(
        UserError, match=r"another config \(distill.optimizer.lr: 0.001 there, 0.1 here\)"
    ):
        loop.train(config(files, out, distill={"optimizer": {"lr": 0.1}}))
    with pytest.raises(UserError, match="resume=true"):
        loop.train(config(files, out, resume=False))
    loop.train(config(files, out, checkpoint={"every": 100}))
    with pytest.raises(UserError, match="finished run"):
        loop.train(config(files, out))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": "./none"}, "none"),
        ({"teacher": "./none"}, "none"),
        ({"trackers": ["wandbb"]}, "unknown installed tracker 'wandbb'"),
        ({"data": {"path": "none.jsonl"}}, "no such file"),
    ],
)
def test_bad_inputs(files, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        loop.train(config(files, tmp_path / "run", **changes))


def test_another_vocabulary(files, tmp_path, capsys):
    testing.tiny_checkpoint(tmp_path / "teacher", vocab_size=320)
    with pytest.raises(UserError, match="vocab_size 320 and the student has 300"):
        loop.train(config(files, tmp_path / "run", teacher=str(tmp_path / "teacher")))
    assert "tok/s" not in capsys.readouterr().err, "the bar begins with training"


@pytest.mark.parametrize("family", testing.MAIN_FAMILIES)
def test_families(files, tmp_path, family):
    testing.tiny_checkpoint(tmp_path / "model", family)
    changes = {"student": str(tmp_path / "model"), "teacher": str(tmp_path / "model")}
    loop.train(config(files, tmp_path / "run", budget={"tokens": 1}, **changes))
    assert log(tmp_path / "run", "kl")[1] == pytest.approx(0, abs=1e-5)
