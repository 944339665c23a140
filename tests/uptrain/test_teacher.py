"""The teacher's most likely tokens: computed once, then read; the teacher is loaded if needed."""

import os

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save

from supra import testing
from supra.checkpoint.files import held
from supra.data.packing import collate
from supra.errors import UserError
from supra.uptrain import loop, teacher, tree
from supra.uptrain.data import BlockStream, training_documents
from supra.uptrain.teacher import Teacher
from tests.checkpoint.test_files import another_process
from tests.uptrain.test_loop import assert_same_weights, log, merged
from tests.uptrain.texts import write_texts

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A student, a teacher that it differs from, and text."""
    folder = tmp_path_factory.mktemp("teacher")
    testing.tiny_checkpoint(folder / "teacher")
    testing.tiny_checkpoint(folder / "student", seed=1)
    write_texts(folder / "text.jsonl", 20)
    return folder


def config(files, out, teacher=None, **distill):
    values = {
        "student": str(files / "student"),
        "teacher": teacher or str(files / "teacher"),
        "out": str(out),
        "data": {"path": str(files / "text.jsonl"), "sequence_length": 16},
        "distill": {"tokens": 4 * 64, "optimizer": {"lr": 1e-3}, "temperature": 2.0},
        "batch": {"size": 2, "accumulation": 2},
        "precision": "fp32",
    }
    return tree.build(merged(values, {"distill": distill}))


def blocks(run, count=2):
    tokenizer = testing.tiny_tokenizer(run.out)
    stream = BlockStream(*training_documents(run), tokenizer, run.data.sequence_length)
    return collate(next(stream) for _ in range(count))


@pytest.fixture
def loaded(monkeypatch):
    """The number of times that a teacher was loaded."""
    calls, find = [], teacher.find_checkpoint

    class Spy:
        def __init__(self, name):
            self.checkpoint = find(name)

        def config(self):
            return self.checkpoint.config()

        def fingerprint(self):
            return self.checkpoint.fingerprint()

        def model(self, dtype):
            calls.append(dtype)
            return self.checkpoint.model(dtype)

    monkeypatch.setattr(teacher, "find_checkpoint", Spy)
    return calls


def test_the_second_run_only_reads(files, tmp_path, loaded):
    runs = [tmp_path / "first", tmp_path / "second"]
    for run in runs:
        loop.train(config(files, run, top_k=8, cache=str(tmp_path / "cache")))
    assert loaded == [torch.float32], "by the first run"
    assert log(runs[0]) == log(runs[1]) and log(runs[0], "kl") == log(runs[1], "kl")
    assert_same_weights(*runs)
    files = list((tmp_path / "cache").rglob("*.safetensors"))
    assert len(files) == 16 and not list((tmp_path / "cache").rglob(".*"))
    tensors = load_file(files[0])
    assert sum(x.numel() * x.element_size() for x in tensors.values()) == 16 * 8 * 6


def test_a_model_that_was_forgotten_is_loaded_again(files, tmp_path, loaded):
    settings = config(files, tmp_path, top_k=8)
    asked = Teacher(settings, Accelerator(cpu=True))
    first, again = (asked.targets(blocks(settings))(slice(0, 20)) for _ in range(2))
    assert len(loaded) == 1
    asked.forget()
    assert torch.equal(asked.targets(blocks(settings))(slice(0, 20)).tokens, again.tokens)
    assert len(loaded) == 2 and torch.equal(first.tokens, again.tokens)


def test_without_a_cache_they_are_the_same(files, tmp_path, loaded):
    loop.train(config(files, tmp_path / "kept", top_k=8, cache=str(tmp_path / "cache")))
    loop.train(config(files, tmp_path / "anew", top_k=8))
    assert loaded == [torch.float32] * 2
    assert log(tmp_path / "kept") == log(tmp_path / "anew")


def test_all_tokens_are_the_whole_distribution(files, tmp_path):
    loop.train(config(files, tmp_path / "whole"))
    loop.train(config(files, tmp_path / "top", top_k=testing.VOCABULARY))
    whole, top = log(tmp_path / "whole"), log(tmp_path / "top")
    assert list(top.values()) == pytest.approx(list(whole.values()), rel=1e-3)  # of float16


@pytest.mark.parametrize("change", [{"top_k": 4}, {"temperature": 1.0}], ids=["top_k", "t"])
def test_other_numbers_are_other_files(files, tmp_path, change, loaded):
    cache = str(tmp_path / "cache")
    for changes in ({"top_k": 8}, {"top_k": 8} | change):
        settings = config(files, tmp_path, cache=cache, **changes)
        Teacher(settings, Accelerator(cpu=True)).targets(blocks(settings))
    assert len(loaded) == 2 and len(list((tmp_path / "cache").rglob("*.safetensors"))) == 4


def test_another_teacher_in_the_same_place_has_other_files(files, tmp_path):
    found = []
    for seed in (0, 1):
        testing.tiny_checkpoint(tmp_path / "teacher", seed=seed)
        settings = config(
            files,
            tmp_path,
            teacher=str(tmp_path / "teacher"),
            top_k=8,
            cache=str(tmp_path / "cache"),
        )
        asked = Teacher(settings, Accelerator(cpu=True))
        found.append(asked.targets(blocks(settings))(slice(0, 20)).tokens)
    assert not torch.equal(*found)


def test_a_missing_block_is_computed(files, tmp_path, loaded):
    settings = config(files, tmp_path, top_k=8, cache=str(tmp_path / "cache"))
    batch = blocks(settings)
    found = []
    for _ in range(2):
        rows = Teacher(settings, Accelerator(cpu=True)).targets(batch)(slice(3, 20))
        found.append(rows)
        os.remove(next((tmp_path / "cache").rglob("*.safetensors")))
    assert len(loaded) == 2
    assert torch.equal(found[0].tokens, found[1].tokens)
    assert torch.equal(found[0].log_probabilities, found[1].log_probabilities)


def test_more_likely_tokens_than_there_are(files, tmp_path):
    message = r"distill.top_k \(=301\) is more than the vocabulary's 300 tokens"
    with pytest.raises(UserError, match=message):
        loop.train(config(files, tmp_path / "run", top_k=301))
    assert not (tmp_path / "run" / "checkpoints").exists()


def kept(tokens=(16, 8), log_probabilities=(16, 8)):
    return {
        "tokens": torch.zeros(tokens, dtype=torch.int32),
        "log_probabilities": torch.zeros(log_probabilities, dtype=torch.float16),
    }


DAMAGES = {
    "empty": b"",
    "cut": save(kept())[:-9],
    "header": b"\xff" * 99,
    "text": b"mine",
    "other names": save({"x": torch.zeros(2)}),
    "shorter": save(kept((15, 8), (15, 8))),
    "fewer tokens": save(kept((16, 7), (16, 7))),
    "two shapes": save(kept((16, 8), (16, 7))),
    "beyond the vocabulary": save(kept() | {"tokens": torch.full((16, 8), 300)}),
    "negative": save(kept() | {"tokens": torch.full((16, 8), -1)}),
    "no numbers": save(kept() | {"log_probabilities": torch.full((16, 8), torch.nan).half()}),
    "another dtype": save(kept() | {"log_probabilities": torch.zeros(16, 8)}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_block_is_computed(files, tmp_path, loaded, capsys, damage):
    settings = config(files, tmp_path, top_k=8, cache=str(tmp_path / "cache"))
    batch = blocks(settings)
    before = Teacher(settings, Accelerator(cpu=True)).targets(batch)(slice(0, 32))
    file = sorted((tmp_path / "cache").rglob("*.safetensors"))[0]
    whole = file.read_bytes()
    file.write_bytes(DAMAGES[damage])
    now = Teacher(settings, Accelerator(cpu=True)).targets(batch)(slice(0, 32))
    assert f"supra: {file} is damaged: the teacher runs again" in capsys.readouterr().err
    assert len(loaded) == 2 and file.read_bytes() == whole
    assert torch.equal(before.tokens, now.tokens)
    assert torch.equal(before.log_probabilities, now.log_probabilities)


def test_what_a_killed_process_left_of_a_block_goes(files, tmp_path):
    settings = config(files, tmp_path, top_k=8, cache=str(tmp_path / "cache"))
    Teacher(settings, Accelerator(cpu=True)).targets(blocks(settings))
    kept = sorted((tmp_path / "cache").rglob("*.safetensors"))
    for file in kept:
        file.rename(file.with_name(f".{file.name}.partial"))
    Teacher(settings, Accelerator(cpu=True)).targets(blocks(settings))
    assert sorted(x for x in (tmp_path / "cache").rglob("*") if x.is_file()) == kept


def test_a_block_that_another_process_writes_is_left_to_it(files, tmp_path):
    settings = config(files, tmp_path, top_k=8, cache=str(tmp_path / "cache"))
    batch = blocks(settings)
    before = Teacher(settings, Accelerator(cpu=True)).targets(batch)(slice(0, 32))
    file, other = sorted((tmp_path / "cache").rglob("*.safetensors"))
    partial = file.rename(file.with_name(f".{file.name}.partial"))
    with another_process(partial, lambda path: held(path, path)):
        now = Teacher(settings, Accelerator(cpu=True)).targets(batch)(slice(0, 32))
    assert torch.equal(before.tokens, now.tokens)
    assert partial.exists() and other.exists() and not file.exists()
