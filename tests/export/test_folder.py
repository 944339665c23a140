"""The folder of an export: complete or absent, its dtypes, shards, tokenizer, card and memory."""

import json
import multiprocessing
import time
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import supra.checkpoint.files
import supra.export.comparison
import supra.export.export
from supra.checkpoint.shard_writer import ShardWriter
from supra.checkpoint.weights import FolderReader
from supra.errors import UserError
from supra.export.comparison import Difference
from supra.export.export import export
from supra.testing import tiny_tokenizer
from tests.export.models import converted, set_fields

TO = {"to": "qwen3_5", "idle_attention": True}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A converted model with all that a folder may have beside weights."""
    folder = tmp_path_factory.mktemp("source")
    rnn = converted(folder, "llama", "qwen3_5", num_hidden_layers=1)
    (rnn / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    (rnn / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, "top_p": 0.9}))
    (rnn / "LICENSE").write_text("MIT License\n")
    (rnn / "README.md").write_text(
        "---\nlicense: mit\nbase_model: a/b\ntags: [supra]\n---\nthe old card\n"
    )
    return rnn


@pytest.fixture(scope="module")
def exported(source):
    return export(source, source.parent / "out", **TO, shard_bytes=50_000)


def dtypes(folder):
    return {name: spec.dtype for name, spec in FolderReader(folder).specs.items()}


def test_what_a_folder_has(source, exported):
    names = {file.name for file in (source.parent / "out").iterdir()}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
            "generation_config.json", "LICENSE", "README.md",
            "model.safetensors.index.json"} < names  # fmt: skip
    assert not [name for name in names if name.endswith(".py") or name == "conversion.json"]
    assert len([name for name in names if name.endswith(".safetensors")]) > 3
    model = AutoModelForCausalLM.from_pretrained(source.parent / "out")
    assert model.generation_config.top_p == 0.9
    tokenizer = AutoTokenizer.from_pretrained(source.parent / "out")
    assert tokenizer.apply_chat_template([{"content": "x"}], tokenize=False) == "x"


def test_the_card_says_what_the_model_was(source, exported):
    card = (source.parent / "out" / "README.md").read_text()
    assert "license: mit" in card and "base_model: a/b" in card
    assert "supra export rnn --to qwen3_5 --out ./out --dtype float32 --idle-attention" in card
    assert exported.lines()[1] in card
    assert str(source.parent) not in card
    assert "the old card" not in card


def test_matrices_take_the_dtype_and_the_rest_stays_float32(source, tmp_path):
    result = export(source, tmp_path / "out", **TO, dtype=torch.bfloat16)
    assert result.difference.largest < 1e-5 < result.rounded.largest < 0.1
    found = dtypes(tmp_path / "out")
    for name, dtype in found.items():
        matrix = name.endswith("weight") and "norm" not in name and "conv1d" not in name
        assert dtype == (torch.bfloat16 if matrix else torch.float32), name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_bfloat16_teacher_keeps_its_dtype(tmp_path):
    rnn = converted(tmp_path, "llama", "qwen3_5", dtype=torch.bfloat16, num_hidden_layers=1)
    result = export(rnn, tmp_path / "out", **TO)
    found = dtypes(tmp_path / "out")
    assert found["model.embed_tokens.weight"] == torch.bfloat16
    assert result.dtype == "bfloat16" and result.idle_bytes == 2 * 8 * 2  # key and value, 8 numbers
    reader = [FolderReader(folder) for folder in (rnn, tmp_path / "out")]
    for name in ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"):
        assert torch.equal(*(x.load(name) for x in reader))


def test_float16_that_overflows(source, tmp_path, monkeypatch):
    def large(self, name):
        return torch.full(self.specs[name].shape, 1e6)

    monkeypatch.setattr(FolderReader, "load", large)
    with pytest.raises(UserError, match="give --dtype float32 or bfloat16"):
        export(source, tmp_path / "out", **TO, dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []


def test_another_tokenizer_than_the_architectures_own(tmp_path):
    """transformers would take Qwen3.5's class, which splits text otherwise."""
    rnn = converted(tmp_path, "llama", "qwen3_5", num_hidden_layers=1)
    tiny_tokenizer(rnn, "<bos> $A")
    file = rnn / "tokenizer_config.json"
    fields = json.loads(file.read_text()) | {"tokenizer_class": "GPT2Tokenizer"}
    file.write_text(json.dumps(fields))
    export(rnn, tmp_path / "out", **TO)
    text = "Who sees 20,000 stones?"
    one, other = (AutoTokenizer.from_pretrained(folder)(text) for folder in (rnn, tmp_path / "out"))
    assert one == other


def test_a_model_without_a_tokenizer(source, tmp_path, capsys):
    rnn = converted(tmp_path, "llama", "qwen3_5", num_hidden_layers=1)
    for file in rnn.glob("tokenizer*"):
        file.unlink()
    export(rnn, tmp_path / "out", **TO)
    assert "the exported model has none either" in capsys.readouterr().out
    assert not list((tmp_path / "out").glob("tokenizer*"))


def test_text_to_compare_on(source, tmp_path):
    (tmp_path / "short.txt").write_text("few words")
    with pytest.raises(UserError, match=r"must have at least 168 tokens, has \d+"):
        export(source, tmp_path / "out", **TO, text=str(tmp_path / "short.txt"))
    (tmp_path / "long.txt").write_text("the river runs to the sea. " * 60)
    export(source, tmp_path / "out", **TO, text=str(tmp_path / "long.txt"))


def test_a_difference_over_the_limit_is_an_error(source, tmp_path, monkeypatch):
    monkeypatch.setattr(
        supra.export.comparison, "difference", lambda *logits: Difference(0.0, 2e-3)
    )
    with pytest.raises(UserError, match=r"by 2.0e-03 in 8 tokens decoded after it, and more than"):
        export(source, tmp_path / "out", **TO)
    assert list(tmp_path.iterdir()) == []


def test_logits_that_are_not_numbers_are_an_error(source, tmp_path, monkeypatch):
    broken = Difference(float("nan"), float("nan"))
    monkeypatch.setattr(supra.export.comparison, "difference", lambda *logits: broken)
    with pytest.raises(UserError, match="is a mistake"):
        export(source, tmp_path / "out", **TO)


def test_an_output_that_exists(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        export(source, tmp_path / "out", **TO)


def test_disk_too_small(source, tmp_path, monkeypatch):
    free = SimpleNamespace(free=1000)
    monkeypatch.setattr(supra.checkpoint.files.shutil, "disk_usage", lambda path: free)
    with pytest.raises(UserError, match=r"0.0 GB free: make room"):
        export(source, tmp_path / "out", **TO)


def test_the_disk_fills_up(source, tmp_path, monkeypatch):
    def full(self, name, tensor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ShardWriter, "add", full)
    with pytest.raises(OSError, match="No space left"):
        export(source, tmp_path / "out", **TO, shard_bytes=20_000)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_export_leaves_nothing_that_loads(source, tmp_path, monkeypatch):
    """SIGKILL while tensors are written; the next export cleans up and succeeds."""
    fork = multiprocessing.get_context("fork")
    writing = fork.Event()
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "add", lambda *_: writing.set() or time.sleep(60))
        process = fork.Process(target=export, args=(source, tmp_path / "out"), kwargs=TO)
        process.start()
    assert writing.wait(60)
    process.kill()
    process.join()
    assert [folder.name for folder in tmp_path.iterdir()] == [".out.partial"]
    export(source, tmp_path / "out", **TO)
    assert [folder.name for folder in tmp_path.iterdir()] == ["out"]


def test_a_tensor_is_written_before_the_next_is_read(source, tmp_path, monkeypatch):
    order, load, add = [], FolderReader.load, ShardWriter.add
    monkeypatch.setattr(FolderReader, "load", lambda s, n: (order.append("read"), load(s, n))[1])
    monkeypatch.setattr(ShardWriter, "add", lambda s, n, x: (order.append("write"), add(s, n, x)))
    export(source, tmp_path / "out", **TO)
    written = order[: len(order) - order[::-1].index("write")]
    runs = "".join(x[0] for x in written).split("w")
    assert max(map(len, runs)) == 7  # a joined projection reads three weights, w and three biases


def test_files_are_readable_by_others(source, exported):
    out = source.parent / "out"
    modes = {
        file.stat().st_mode & 0o044 for file in (out / "README.md", *out.glob("*.safetensors"))
    }
    assert len(modes) == 1


def test_exports_are_told_apart_from_converted_models(source, exported):
    with pytest.raises(UserError, match="is not converted"):
        export(source.parent / "out", source.parent / "again", **TO)


def test_config_json_is_json(source, exported):
    """Without Infinity, which transformers writes for Granite."""
    set_fields(source.parent / "out")  # reads and writes it
    text = (source.parent / "out" / "config.json").read_text()
    assert "Infinity" not in text and "NaN" not in text


def test_a_model_that_transformers_saved(source, tmp_path):
    """As training saves it: other shards, other tensors first, no report."""
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(
        tmp_path / "rnn", max_shard_size="20KB"
    )
    result = export(tmp_path / "rnn", tmp_path / "out", **TO)
    assert result.dtype == "bfloat16" and result.difference.largest < 1e-5
