"""`supra export --to gguf`: what it refuses, and what it says where llama.cpp is missing."""

import pytest

import supra.export.gguf.export
from supra.checkpoint.opening import find_checkpoint
from supra.cli import main
from supra.conversion.convert import convert
from supra.conversion.inspection import inspect_model
from supra.errors import UserError
from supra.export import llama_cpp
from supra.export.gguf.export import export_gguf
from supra.export.targets import TARGETS
from supra.testing import tiny_checkpoint
from tests.export.models import converted

pytest.importorskip("gguf", reason="the package gguf is not installed")


@pytest.fixture(autouse=True)
def without_llama_cpp(monkeypatch):
    """Whether llama.cpp is installed or not, these tests run without it."""
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    llama_cpp._library.cache_clear()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 16, "intermediate_size": 96}
    return converted(tmp_path_factory.mktemp("gguf"), "llama", "gguf", num_hidden_layers=1, **sizes)


def obstacles(folder, family, mixer, options=None, keep=(), **sizes):
    tiny_checkpoint(folder / "base", family, **{"num_hidden_layers": 2} | sizes)
    convert(folder / "base", folder / "rnn", mixer=mixer, options=options, keep_attention=keep)
    return TARGETS["gguf"].obstacles(find_checkpoint(str(folder / "rnn")).config())


def test_without_llama_cpp_transformers_class_is_compared(source, tmp_path):
    result = export_gguf(source, tmp_path / "rnn.gguf", type="q8_0", idle_attention=True)
    assert result.engine == "transformers" and result.difference.largest < 1e-5
    assert "in float32 its logits in transformers differ" in result.lines()[1]
    assert [path.name for path in tmp_path.iterdir()] == ["rnn.gguf"]


def test_four_bits_need_llama_cpp(source, tmp_path):
    with pytest.raises(UserError, match=r"llama\.cpp is not installed: pip install 'xllamacpp"):
        export_gguf(source, tmp_path / "rnn.gguf", type="q4_k_m", idle_attention=True)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_refused(source, tmp_path):
    (tmp_path / "rnn.gguf").write_bytes(b"before")
    with pytest.raises(UserError, match=r"rnn\.gguf\) exists: name a new file, or remove it"):
        export_gguf(source, tmp_path / "rnn.gguf", idle_attention=True)
    assert (tmp_path / "rnn.gguf").read_bytes() == b"before"


def test_a_full_disk_leaves_nothing(source, tmp_path, monkeypatch):
    def fill(*arguments, **more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(supra.export.gguf.export, "write_gguf", fill)
    with pytest.raises(OSError, match="No space left"):
        export_gguf(source, tmp_path / "rnn.gguf", idle_attention=True)
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_tokenizer_is_refused(tmp_path):
    rnn = converted(tmp_path, "llama", "gguf", num_hidden_layers=1)
    for file in rnn.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match="has no tokenizer, which a GGUF file holds"):
        export_gguf(rnn, tmp_path / "rnn.gguf", idle_attention=True)


def test_a_pure_model_needs_an_idle_layer(source, tmp_path):
    with pytest.raises(UserError, match="--idle-attention, which appends one"):
        export_gguf(source, tmp_path / "rnn.gguf")


def test_other_mixers_are_named(tmp_path):
    (found,) = obstacles(tmp_path, "llama", "retention")
    names = "--mixer gated_deltanet, or mamba2 form=granite, or rwkv form=qrwkv"
    assert "its layers are" in found and found.endswith(f"convert with {names}")


def test_rwkv_needs_no_idle_layer(tmp_path):
    options = {"form": "qrwkv"}
    assert obstacles(tmp_path, "qwen2", "rwkv", options) == []
    lines = inspect_model(find_checkpoint(str(tmp_path / "rnn")).config(), []).lines()
    assert "export:     to gguf" in lines
    with pytest.raises(UserError, match="not for rwkv, which needs no attention"):
        export_gguf(tmp_path / "rnn", tmp_path / "rnn.gguf", idle_attention=True)


def test_rwkv_of_another_form_is_named(tmp_path):
    (found,) = obstacles(tmp_path, "llama", "rwkv")
    assert found.endswith("convert with form=qrwkv")


def test_scaled_positions_of_kept_layers_are_named(tmp_path):
    rope = {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}
    (found,) = obstacles(tmp_path, "qwen3", "gated_deltanet", keep=[1], rope_parameters=rope)
    assert "its kept layers have rope_type linear" in found


def test_a_width_that_llama_cpp_does_not_load_is_named(tmp_path):
    options = {"form": "granite"}
    (found,) = obstacles(tmp_path, "llama", "mamba2", options, head_dim=16)
    assert "192 channels wide, and llama.cpp needs twice the hidden_size (=48)" in found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--to gguf --dtype float16", "--dtype (=float16) is not for --to gguf: give --type"),
        ("--to gguf --shard-size 1", "--shard-size (=1.0) is not for --to gguf: give --type"),
        ("--to granite --type f16", "--type (=f16) is for --to gguf: give --dtype"),
        ("--to gguf --type q4", "unknown --type 'q4'"),
    ],
)
def test_options_of_the_other_kind_are_refused(source, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        main(["export", str(source), "--out", str(tmp_path / "x.gguf"), *arguments.split()])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
