"""`supra bench decode` in transformers; tests/engines has it in llama.cpp."""

import functools
import json
import re

import pytest
import torch

from supra.bench import decode
from supra.cli import main
from supra.errors import UserError
from supra.model.compiled_decoding import compiled_decoding
from tests.export.models import converted


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The folders of a teacher and its student."""
    folder = tmp_path_factory.mktemp("decode")
    rnn = converted(folder, "llama", "gguf", num_hidden_layers=1)
    return str(folder / "base"), str(rnn)


@pytest.fixture
def here(monkeypatch):
    """Measures in this process: starting others takes long."""
    monkeypatch.setattr(decode, "_alone", decode.measure)


def test_the_teachers_state_grows_and_the_students_does_not(pair, here, capsys):
    teacher, student = pair
    options = "--lengths 24,48 --tokens 3 --engines transformers --batches 1,3 --json"
    main(["bench", "decode", "--model", student, "--teacher", teacher, *options.split()])
    found = json.loads(capsys.readouterr().out)
    states = {(x["role"], x["batch"], x["length"]): x["state"] for x in found["speeds"]}
    keys_and_values = 2 * 2 * 8 * 4  # 2 heads of 8 channels in float32
    assert states["teacher", 1, 24] == 24 * keys_and_values
    assert states["teacher", 1, 48] == 48 * keys_and_values
    assert states["student", 1, 24] == states["student", 1, 48] > 0
    assert all(
        states[role, 3, n] == 3 * states[role, 1, n] for role in decode.ROLES for n in (24, 48)
    )
    assert all(x["seconds"] > 0 and x["peak"] > 1e6 for x in found["speeds"])
    assert all(x["operators"] > 100 and x["dtype"] == "float32" for x in found["speeds"])
    assert found["machine"]


def test_a_compiled_step_is_measured(pair, here, monkeypatch, capsys):
    teacher, student = pair
    eager = functools.partial(compiled_decoding, "eager")
    monkeypatch.setattr(decode, "compiled_decoding", eager)
    options = "--lengths 24 --tokens 3 --engines compiled --batches 2 --json"
    main(["bench", "decode", "--model", student, "--teacher", teacher, *options.split()])
    speeds = {x["role"]: x for x in json.loads(capsys.readouterr().out)["speeds"]}
    places, keys_and_values = 24 + decode.WARM_UP + 3, 2 * 2 * 8 * 4
    assert speeds["teacher"]["state"] == 2 * places * keys_and_values
    assert all(x["operators"] is None and x["seconds"] > 0 for x in speeds.values())


def test_the_table_has_a_row_for_every_length(pair, here, capsys):
    teacher, student = pair
    decode.report(student, teacher=teacher, lengths=[10, 25], tokens=2, engines=["transformers"])
    printed, said = capsys.readouterr()
    named = r"^transformers, float32, (?:teacher|student) at .* ms a token$"
    assert len(re.findall(named, said, re.M)) == 4
    start = r"^\| transformers \| float32 \| 1 +\|"
    assert all(re.search(rf"{start} {n} +\|", printed, re.M) for n in (10, 25))
    assert "transformers, float32, student: a token at 25 takes" in printed


def test_ratios_are_the_teachers_time_over_the_students():
    speeds = [
        decode.Speed("llama.cpp", role, length, seconds, 1_000_000, 2_000_000, "f16")
        for role, length, seconds in (
            ("teacher", 2048, 0.01), ("student", 2048, 0.01),
            ("teacher", 32768, 0.06), ("student", 32768, 0.015),
        )
    ]  # fmt: skip
    first, last = decode.rows(speeds)
    assert first[:7] == ["llama.cpp", "f16", "1", "2,048", "10.0", "10.0", "1.00"]
    assert last[3:9] == ["32,768", "60.0", "15.0", "4.00", "16.7", "66.7"]
    assert last[9:] == ["1.0", "1.0", "2.0", "2.0", "", ""]
    assert decode.growth(speeds)[1].endswith("takes 1.50 times as long as at 2,048")


@pytest.mark.parametrize("length, part", [(2048, 1024), (32768, 1024), (1000, 1000), (1031, 1)])
def test_a_teacher_reads_a_part_that_divides_the_length(length, part):
    assert decode._part(length) == part


def test_a_teachers_cache_holds_copies_of_the_part(pair):
    teacher = decode.find_checkpoint(pair[0]).model().eval()
    tokens = torch.randint(1, 300, (1, 2 * decode.PART))
    with torch.no_grad():
        (layer,) = decode._filled(teacher, tokens).layers
    first, second = layer.keys.chunk(2, dim=2)
    assert layer.keys.shape[2] == 2 * decode.PART and torch.equal(first, second)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"engines": ["vllm"]},
            r"unknown engines 'vllm' \(known: compiled, llama\.cpp, transformers\)",
        ),
        ({"type": "q5"}, "unknown type 'q5'"),
        ({"dtypes": ["int8"]}, "unknown dtype 'int8'"),
    ],
)
def test_what_is_no_option(pair, given, message):
    with pytest.raises(UserError, match=message):
        decode.report(pair[1], teacher=pair[0], **given)


def test_a_student_that_is_not_converted_is_refused(pair, monkeypatch):
    monkeypatch.setattr(decode.llama_cpp, "version", lambda: "llama.cpp")
    with pytest.raises(UserError, match="is not converted: run supra convert --export-ready gguf"):
        decode.report(pair[0], teacher=pair[0])
