"""`supra bench decode` in llama.cpp."""

import json

import pytest

from supra.bench import decode
from supra.cli import main
from supra.export import llama_cpp
from tests.export.models import converted

pytest.importorskip("gguf", reason="the package gguf is not installed")
if not llama_cpp.is_installed():
    pytest.skip("the package xllamacpp is not installed", allow_module_level=True)


def test_the_teachers_state_grows_and_the_students_does_not(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(decode, "_alone", decode.measure)
    monkeypatch.setattr(decode, "PART", 64)
    rnn = converted(tmp_path, "llama", "gguf", num_hidden_layers=2)
    options = "--lengths 128,256 --tokens 3 --engines llama.cpp --type f16 --json"
    models = "--model", str(rnn), "--teacher", str(tmp_path / "base")
    main(["bench", "decode", *models, *options.split()])
    found = json.loads(capsys.readouterr().out)
    states = {(x["role"], x["length"]): x["state"] for x in found["speeds"]}
    assert states["teacher", 256] > 1.9 * states["teacher", 128]
    # of the idle layer alone: one head of 8 channels in float16, and the numbers of its cells
    assert states["student", 256] - states["student", 128] < 128 * 64
    assert found["llama.cpp"] == llama_cpp.version()
