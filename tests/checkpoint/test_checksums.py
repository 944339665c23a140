"""`supra inspect --verify` finds a single flipped bit, in conversions and exports."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from supra import testing
from supra.checkpoint.checksums import checksum, record_checksums
from supra.cli import main
from supra.conversion.convert import convert
from supra.uptrain import models


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Folders that supra wrote: a conversion, one in shards, and the export of a training run."""
    home = tmp_path_factory.mktemp("written")
    testing.tiny_checkpoint(home / "base", dtype="bfloat16")
    convert(home / "base", home / "whole", mixer="mamba2")
    convert(home / "base", home / "shards", mixer="mamba2", shard_bytes=40_000)
    config = SimpleNamespace(student=str(home / "shards"), gradient_checkpointing=False, lora=None)
    student = models.load_student(config)
    for parameter in student.parameters():
        parameter.data += 0.01
    (home / "export").mkdir()
    tokenizer = AutoTokenizer.from_pretrained(home / "shards")
    models.export(config, student.state_dict(), tokenizer, home / "export")
    return home


NAMES = ["whole", "shards", "export"]


@pytest.mark.parametrize("name", NAMES)
def test_what_was_written_is_found_again(written, name, capsys):
    main(["inspect", str(written / name), "--verify", "--json"])
    found = json.loads(capsys.readouterr().out)
    files = [load_file(file) for file in (written / name).glob("*.safetensors")]
    assert found["verified"] == sum(map(len, files)) > 20


@pytest.mark.parametrize("name", NAMES)
def test_a_flipped_bit_is_found(written, name, tmp_path, capsys):
    shutil.copytree(written / name, tmp_path / name)
    file = max((tmp_path / name).glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 4
    file.write_bytes(content)
    assert "1 of " in (line := refused(capsys, "inspect", tmp_path / name, "--verify"))
    assert "changed since they were written, first " in line
    main(["inspect", str(tmp_path / name)])  # it reads no weights


def test_lost_and_added_tensors_are_found(written, tmp_path, capsys):
    shutil.copytree(written / "whole", tmp_path / "rnn")
    file = tmp_path / "rnn" / "model.safetensors"
    tensors = load_file(file)
    tensors["other"] = tensors.pop("model.norm.weight")
    save_file(tensors, file)
    assert "2 of " in refused(capsys, "inspect", tmp_path / "rnn", "--verify")


def test_folders_without_checksums_say_so(written, tmp_path, capsys):
    assert "has no checksums" in refused(capsys, "inspect", written / "base", "--verify")
    shutil.copytree(written / "whole", tmp_path / "old")
    file = tmp_path / "old" / "conversion.json"
    report = json.loads(file.read_text())
    del report["checksums"]
    file.write_text(json.dumps(report))
    assert "has no checksums" in refused(capsys, "inspect", tmp_path / "old", "--verify")
    for text in ("{", "[]", "null", "[" * 100_000):
        file.write_text(text)
        assert "conversion.json is " in refused(capsys, "inspect", tmp_path / "old", "--verify")


@pytest.mark.parametrize("text", ["{", "[]", "null", "[" * 100_000, "\xff"])
def test_a_report_that_is_none_stops_no_export(written, tmp_path, capsys, text):
    shutil.copytree(written / "whole", tmp_path / "rnn")
    (tmp_path / "rnn" / "conversion.json").write_text(text, encoding="latin-1")
    (line,) = record_checksums(tmp_path / "rnn")
    assert line.startswith("conversion.json is ")
    main(["inspect", str(tmp_path / "rnn"), "--verify", "--json"])
    assert json.loads(capsys.readouterr().out)["verified"] > 20


def test_dtype_and_shape_count():
    ones = torch.ones(2, 3)
    others = [ones.T, ones.view(6), ones.bfloat16(), ones.int(), -ones, ones[0, 0]]
    assert len({checksum(x) for x in (ones, *others)}) == 7
    assert checksum(ones) == checksum(ones.T.contiguous().T)


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main([str(x) for x in arguments])
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]
