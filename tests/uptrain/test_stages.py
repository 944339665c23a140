"""Runs of several stages: what each one trains, resuming across boundaries, and the log."""

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from supra import testing
from supra.conversion.convert import convert
from supra.errors import UserError
from supra.uptrain import load_config, loop, tree
from supra.uptrain.stage_settings import STAGES
from tests.uptrain.test_loop import assert_same_weights, interrupt_after, log, merged, weights
from tests.uptrain.texts import write_texts

pytestmark = pytest.mark.usefixtures("one_thread", "own_cache")


RECIPES = Path(__file__).parents[2] / "recipes" / "configs"
TOKENS = 64  # of a step


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A teacher, a hybrid of it, and text."""
    folder = tmp_path_factory.mktemp("stages")
    testing.tiny_checkpoint(folder / "teacher", num_hidden_layers=3, tie_word_embeddings=True)
    convert(str(folder / "teacher"), folder / "student", mixer="supra", keep_attention=[1])
    write_texts(folder / "text.jsonl", 40)
    return folder


FAST = {"lr": 3e-3, "weight_decay": 0.1}
FULL = {
    "align": {"tokens": 3 * TOKENS, "optimizer": FAST},
    "distill": {"tokens": 3 * TOKENS, "next_token": 0.1, "optimizer": FAST},
    "tune": {"tokens": 3 * TOKENS, "optimizer": FAST},
}


def config(files, out, **changes):
    values = {
        "student": str(files / "student"),
        "out": str(out),
        "data": {"path": str(files / "text.jsonl"), "sequence_length": 16},
        "batch": {"size": 2, "accumulation": 2},
        "precision": "fp32",
    }
    if "distill" in changes:
        values["teacher"] = str(files / "teacher")
    return tree.build(merged(values, changes))


@pytest.mark.parametrize("step", [2, 3, 4, 6, 8])
def test_interrupted_is_unbroken(files, tmp_path, monkeypatch, step):
    """A run resumes within each stage and at the end of a stage."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    changes = FULL | {"calibrate": {"tokens": 64}, "precision": "bf16"}
    loop.train(config(files, whole, **changes))
    with monkeypatch.context() as patch:
        interrupt_after(patch, step, signal.SIGTERM)
        loop.train(config(files, broken, **changes))
    assert list(log(broken)) == list(range(1, step + 1))
    loop.train(config(files, broken, **changes))
    assert log(broken) == log(whole) and log(broken, "lr") == log(whole, "lr")
    assert_same_weights(whole, broken)


def test_interrupted_with_adapters_is_unbroken(files, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    changes = {"align": FULL["align"], "tune": FULL["tune"]}
    changes |= {"lora": {"rank": 2, "dropout": 0.5}, "gradient_checkpointing": True}
    loop.train(config(files, whole, **changes))
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        loop.train(config(files, broken, **changes))
    loop.train(config(files, broken, **changes))
    assert log(broken) == log(whole)
    assert_same_weights(whole, broken)


def test_a_run_is_its_stages_one_after_the_other(files, tmp_path):
    """Each stage has its own schedule over its own steps, and starts with empty moments."""
    loop.train(config(files, tmp_path / "run", **FULL))
    run = tmp_path / "run"
    assert log(run, "stage") == {n: FULL_NAMES[(n - 1) // 3] for n in range(1, 10)}
    rates = list(log(run, "lr").values())
    assert rates[:3] == rates[3:6] == rates[6:] and rates[2] == pytest.approx(3e-4)
    assert "worst_layer" in json.loads((run / "log.jsonl").read_text().splitlines()[0])
    assert list(log(run, "kl")) == [4, 5, 6] and list(log(run, "next_token")) == [*range(4, 10)]
    moments = torch.load(run / "checkpoints" / "step-00000009" / "optimizer.bin")["state"]
    assert {x["step"].item() for x in moments.values()} == {3}  # of the last stage alone


FULL_NAMES = ("align", "distill", "tune")


@pytest.mark.parametrize(
    ("changes", "moved"),
    [
        ({"align": FULL["align"]}, {"attention", "mixer"}),
        ({"align": {"optimizer": {"lr": 0, "new_lr": 1e-2}}}, {"mixer"}),
        ({"align": {"optimizer": {"new_lr": 0}}}, {"attention"}),
        ({"tune": {"optimizer": {"attention_lr": 0}}}, {"mixer", "other"}),
        ({"tune": {"optimizer": {"lr": 0, "attention_lr": 1e-3, "new_lr": 0}}}, {"attention"}),
        ({"tune": {"optimizer": {"lr": 0, "attention_lr": 1e-3, "new_lr": 0}, "share": 0.5},
          "align": {"optimizer": {"lr": 0, "new_lr": 1e-3}}}, {"attention", "mixer"}),
    ],
)  # fmt: skip
def test_only_what_has_a_rate_moves(files, tmp_path, changes, moved):
    loop.train(config(files, tmp_path / "run", budget={"tokens": 3 * TOKENS}, **changes))
    before, after = load_file(files / "student" / "model.safetensors"), weights(tmp_path / "run")
    kinds = {}
    for name, tensor in before.items():
        kind = "mixer" if ".mixer." in name else "attention" if "self_attn" in name else "other"
        kept = kind == "attention" and "layers.1." in name and "tune" not in changes
        kinds.setdefault("kept" if kept else kind, []).append(not torch.equal(tensor, after[name]))
    kinds.pop("kept", None)
    enough = {"mixer": any, "attention": all, "other": all}  # a magnitude is a buffer
    assert {kind for kind, changed in kinds.items() if enough[kind](changed)} == moved
    assert {kind for kind, changed in kinds.items() if any(changed)} == moved


def test_alignment_lowers_its_error_and_perplexity(files, tmp_path, capsys):
    changes = {
        "calibrate": {"tokens": 64},
        "align": {"tokens": 30 * TOKENS, "optimizer": {"lr": 3e-3}},
        "tune": {"tokens": 2 * TOKENS},
        "data": {"eval_documents": 8},
        "eval": {"tokens": 256},
    }
    run = tmp_path / "run"
    loop.train(config(files, run, **changes))
    losses = log(run)
    assert losses[30] < 0.8 * losses[1]
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    evaluated = [
        (line["step"], line["stage"], name)
        for line in lines
        for name in ("converted", "eval")
        if f"{name}_perplexity" in line
    ]
    assert evaluated == [
        (0, "start", "converted"),
        (0, "calibrate", "eval"),
        (30, "align", "eval"),
        (32, "tune", "eval"),
    ]
    said = capsys.readouterr().err
    converted, calibrated = (log(run, f"{x}_perplexity")[0] for x in ("converted", "eval"))
    assert f"calibrate: held-out perplexity {converted:,.2f} -> {calibrated:,.2f}" in said
    assert f"align: held-out perplexity {calibrated:,.2f} -> " in said
    assert "tune: held-out perplexity" in said


def test_orientation(files, tmp_path):
    stage = {"tokens": 4 * TOKENS, "optimizer": {"lr": 3e-3}}
    loop.train(config(files, tmp_path / "run", orient=stage, tune={"tokens": 1}))
    losses = log(tmp_path / "run")
    assert losses[4] < losses[1] and len(losses) == 5


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_runs(files, tmp_path, path):
    names = [name for name in STAGES if f"\n{name}:" in path.read_text()]
    overrides = [
        *(f"{name}={tmp_path if name == 'out' else files / name}" for name in ("student", "out")),
        f"data={{path: {files}/text.jsonl, sequence_length: 16}}",
        *("precision=fp32", "eval.every=0", "batch={size: 2}", "calibrate.tokens=32", "budget={}"),
        *([f"teacher={files}/teacher"] if "distill" in names else []),
        *(
            f"{name}.{key}"
            for name in names
            for key in ("tokens=1", "share=null", "schedule.warmup=0", "sequence_length=null")
        ),
        *(f"{name}.batch={{}}" for name in names),
        *(["extend.state_passing=4"] if "extend" in names else []),
    ]
    loop.train(load_config(path, overrides))
    assert set(log(tmp_path, "stage").values()) == {*names}


def test_a_student_that_is_not_converted(files, tmp_path):
    changes = {"student": str(files / "teacher"), "align": FULL["align"]}
    with pytest.raises(UserError, match="run `supra convert` on it first"):
        loop.train(config(files, tmp_path / "run", **changes))
