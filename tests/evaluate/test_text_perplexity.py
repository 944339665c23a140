"""`supra eval text` as a function: how much it reads, and what it says of arguments and texts."""

import json

import datasets
import pytest

from supra import testing
from supra.checkpoint.opening import find_checkpoint
from supra.data.text import Documents
from supra.errors import UserError
from supra.evaluate.ablate.ablation import diagnose
from supra.evaluate.tasks.task import evaluate_task
from supra.evaluate.text_perplexity import evaluate_text


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    testing.tiny_checkpoint(folder / "model")
    line = json.dumps({"text": "The river rises in the hills."}) + "\n"
    (folder / "text.jsonl").write_text(line * 50)
    return folder


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def evaluate(files, text="text.jsonl", **options):
    return evaluate_text(find_checkpoint(str(files / "model")), str(files / text), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_length": 1}, r"--sequence-length \(=1\) must be at least 2"),
        ({"tokens": 0}, r"--tokens \(=0\) must be at least 1"),
        ({"text_field": "body"}, "text field 'body' is not in the data: its fields are text"),
        ({"text": "none.jsonl"}, "no such file"),
    ],
)
def test_mistakes_are_named(files, options, message):
    with pytest.raises(UserError, match=message) as error:
        evaluate(files, **options)
    assert "data." not in str(error.value), "that is a setting of another command"


def test_windows_longer_than_learned_positions(files, tmp_path):
    testing.tiny_checkpoint(tmp_path / "model", "gpt2")
    checkpoint, text = find_checkpoint(str(tmp_path / "model")), str(files / "text.jsonl")
    for evaluated in (evaluate_text, diagnose):
        with pytest.raises(UserError, match=r"--sequence-length \(=600\): the model has learned"):
            evaluated(checkpoint, text, sequence_length=600)
    found = diagnose(checkpoint, text, sequence_length=64, tokens=256)
    assert "--recall-lengths (=2048): the model has learned 512" in found.left_out["recall"]
    with pytest.raises(
        UserError, match=r"the longest row of induction .=602.: the model has learn"
    ):
        evaluate_task(checkpoint, "induction", lengths=[600], samples=1)


def test_two_tokens_are_enough(files):
    assert 1 < evaluate(files, sequence_length=2).perplexity < float("inf")


def test_no_more_text_is_read_than_wanted(files, monkeypatch):
    read, content_of = [], Documents._content

    def counted(documents, row):
        read.append(row)
        return content_of(documents, row)

    monkeypatch.setattr(Documents, "_content", counted)
    assert evaluate(files, sequence_length=16, tokens=32).tokens <= 30
    assert len(read) < 10
