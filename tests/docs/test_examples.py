"""Every example of the documentation runs on a tiny model and a tiny text, or is parsed."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import yaml

import supra.mixers
from supra.settings.schema import keys, tree
from supra.testing import tiny_checkpoint
from supra.uptrain import UptrainConfig
from tests.docs import examples

README = examples.PAGES[0]
HAVE_EXAMPLES = [page for page in examples.PAGES[1:] if examples.blocks(page)]


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A folder with what the examples name: teacher, student, finished run and text."""
    folder = tmp_path_factory.mktemp("examples")
    tiny_checkpoint(folder / "teacher")
    for name in ("corpus", "stories"):
        with open(folder / f"{name}.jsonl", "w") as file:
            for number in range(15):
                print(json.dumps({"text": f"The river rises {number} times. " * 60}), file=file)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        teacher, text = "teacher=./teacher", "data.path=corpus.jsonl"
        examples.run(["convert", "--model", "./teacher", "--out", "./rnn"])
        run = ["uptrain", "--config", "supra", "student=./rnn", teacher, text, "out=out/first"]
        examples.run(run)
    return folder


@pytest.mark.parametrize("page", HAVE_EXAMPLES, ids=examples.name)
def test_examples(page, material, tmp_path, monkeypatch):
    shutil.copytree(material, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(supra.mixers, "MIXERS", dict(supra.mixers.MIXERS))
    names = {"__name__": "__main__"}  # a block goes on where the last one stopped
    for block in examples.blocks(page):
        assert block.language in examples.LANGUAGES, f"a block of language {block.language!r}"
        if block.language == "python":
            text = block.text.replace(*examples.MODELS)
            exec(compile(text, page.name, "exec"), names)
        elif block.language == "yaml":
            check_settings(block.text)
            (tmp_path / "recipe.yaml").write_text(block.text, encoding="utf-8")
        elif block.language == "bash":
            for command in examples.commands(block):
                arguments = examples.supra_arguments(command)
                if arguments is None or block.reason:
                    examples.parse(command)
                else:
                    examples.run(arguments)


def check_settings(text):
    """Every key of a YAML example is a setting."""
    known = set(keys(tree(UptrainConfig)))
    waiting = [("", yaml.safe_load(text) or {})]  # one may be a comment alone
    for prefix, value in waiting:
        if isinstance(value, dict):
            waiting += [(f"{prefix}.{key}".strip("."), inner) for key, inner in value.items()]
        else:
            assert prefix in known, prefix


SUBSTITUTIONS = [  # (as the README has it, as it is small enough)
    examples.MODELS,
    ("out=out/first", f"out=out/first {' '.join(examples.SMALL_RUN)}"),
    ("--to 65536", "--to 256 --trained-length 32"),
]


def test_the_readme_runs_in_a_shell(material, tmp_path):
    """As a user runs it: every command a process, `accelerate launch` included."""
    for name in ("teacher", "corpus.jsonl"):
        copy = shutil.copytree if (material / name).is_dir() else shutil.copy
        copy(material / name, tmp_path / name)
    environment = os.environ | {
        "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
        "HF_HOME": str(tmp_path / "cache"),
        "ACCELERATE_USE_CPU": "true",
    }
    text, output = README.read_text(encoding="utf-8"), ""
    assert all(written in text for written, _ in SUBSTITUTIONS)
    for block in examples.blocks(README):
        text = block.text
        if block.language == "bash" and text.split()[0] not in ("supra", "accelerate"):
            for command in examples.commands(block):
                examples.parse(command)
            continue
        if block.language == "text":
            continue
        for written, small in SUBSTITUTIONS:
            text = text.replace(written, small)
        interpreter = [sys.executable, "-c"] if block.language == "python" else ["sh", "-ec"]
        result = subprocess.run(
            [*interpreter, text],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert result.returncode == 0, f"{text}\n{result.stderr}"
        output += result.stdout
    for printed in ("copied", "The state is", "perplexity", "layers 0-1 gated_deltanet"):
        assert printed in output
    card = (tmp_path / "out" / "first" / "final" / "README.md").read_text()
    assert "Trained on 256 tokens" in card and "| uptrained |" in card
