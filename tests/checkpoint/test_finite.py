"""Weights and outputs that are not finite give one line and exit code 2, and JSON is strict."""

import json
import math
import shutil

import pytest
from safetensors.torch import load_file, save_file

from supra.checkpoint.json_files import to_json
from supra.cli import main
from supra.conversion.convert import convert
from supra.testing import tiny_checkpoint

NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A teacher and its conversion, intact, and with weights that are NaN or overflow."""
    home = tmp_path_factory.mktemp("finite")
    tiny_checkpoint(home / "base")
    convert(home / "base", home / "rnn", mixer="supra")
    (home / "text.txt").write_text("The river rises in the hills. " * 400)
    for folder in ("base", "rnn"):
        damage(home, folder, "nan", lambda x: x[NAME][3, :5].fill_(math.nan))
        damage(home, folder, "inf", lambda x: x[NAME][3, :5].fill_(-math.inf))
        damage(home, folder, "huge", lambda x: x["lm_head.weight"].fill_(3e38))
        damage(home, folder, "loud", lambda x: x["lm_head.weight"].mul_(1e5))
    return home


def damage(home, folder, kind, change):
    """A copy of the checkpoint with other weights."""
    copy = home / f"{folder}-{kind}"
    shutil.copytree(home / folder, copy)
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main([str(x) for x in arguments])
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.out.strip() == ""
    (line,) = [line for line in printed.err.splitlines() if line.startswith("supra: error")]
    return line


@pytest.mark.parametrize("kind", ["nan", "inf"])
def test_convert_refuses_the_tensor(home, kind, tmp_path, capsys):
    line = refused(capsys, "convert", "--model", home / f"base-{kind}", "--out", tmp_path / "rnn")
    assert f"tensor {NAME} holds NaN or infinity" in line
    assert list(tmp_path.iterdir()) == []


def test_convert_refuses_a_dtype_that_overflows(home, tmp_path, capsys):
    arguments = ["--model", home / "base-huge", "--out", tmp_path / "rnn", "--dtype", "float16"]
    line = refused(capsys, "convert", *arguments)
    assert "tensor lm_head.weight overflows in dtype float16: use bfloat16 or float32" in line
    assert list(tmp_path.iterdir()) == []


TEXT = ["--text", "text.txt", "--sequence-length", "32", "--tokens", "128"]
PASSKEY = ["--lengths", "400", "--samples", "1", "--depths", "1"]
COMMANDS = {
    "eval": ["eval", "text", *TEXT, "--model"],
    "json": ["eval", "text", *TEXT, "--json", "--model"],
    "ablate": ["eval", "ablate", *TEXT, "--parts", "floors", "--model"],
    "task": ["eval", "task", "--task", "induction", "--lengths", "16", "--samples", "2", "--model"],
    "passkey": ["eval", "passkey", *PASSKEY, "--model"],
    "generate": ["generate", "--prompt", "The", "--max-new-tokens", "3", "--model"],
    "sample": ["generate", "--prompt", "The", "--temperature", "1", "--model"],
    "diagnose": ["diagnose", "--text", "text.txt", "--to", "256", "--trained-length", "32"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", ["nan", "inf", "huge"])
def test_commands_refuse_a_model_without_numbers(home, command, kind, capsys, monkeypatch):
    monkeypatch.chdir(home)
    line = refused(capsys, *COMMANDS[command], f"rnn-{kind}")
    assert f"model 'rnn-{kind}' cannot be evaluated" in line
    cause = "its outputs overflow in float32" if kind == "huge" else f"its tensor {NAME} holds"
    assert cause in line


def no_constant(name):
    raise AssertionError(f"{name} is not JSON")


def test_json_is_strict():
    value = {"a": [math.nan, math.inf, (-math.inf, 1.5)], "b": {"c": math.nan}, "d": "NaN"}
    expected = {"a": [None, None, [None, 1.5]], "b": {"c": None}, "d": "NaN"}
    assert json.loads(to_json(value), parse_constant=no_constant) == expected


def test_a_perplexity_that_overflows_is_null(home, capsys, monkeypatch):
    """The loss is still a finite number."""
    monkeypatch.chdir(home)
    main([*COMMANDS["json"], "rnn-loud"])
    result = json.loads(capsys.readouterr().out, parse_constant=no_constant)
    assert result["perplexity"] is None
    assert result["loss"] > 709
