"""The wheel holds every folder and works like a checkout; light imports stay light."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from supra.testing import tiny_checkpoint

ROOT = Path(__file__).parent.parent
FILES = {"supra.recipes.configs", "supra.recipes.launch"}  # packages without code


def test_every_source_folder_is_packaged():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    declared = set(project["tool"]["setuptools"]["packages"])
    library = {
        ".".join(p.parent.relative_to(ROOT).parts) for p in ROOT.glob("supra/**/__init__.py")
    }
    kernels = {
        ".".join(("supra", *p.parent.relative_to(ROOT).parts)) for p in ROOT.glob("kernels/**/*.py")
    }
    assert declared == library | kernels | {"supra.kernels"} | FILES


def test_top_level_kernels_is_not_a_package():
    assert not (ROOT / "kernels" / "__init__.py").exists(), (
        "transformers asks for Hugging Face's package `kernels` by name, and would find ours"
    )


def test_kernels_import_from_anywhere(tmp_path):
    code = "import supra.kernels.linear_attention"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from the files that git would track, so that it has nothing of earlier builds."""
    source = tmp_path_factory.mktemp("source")
    for name in ("supra", "kernels", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    code = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (file,) = (source / "dist").glob("*.whl")
    return file


def test_the_wheel_has_all_files(wheel):
    there = set(zipfile.ZipFile(wheel).namelist())
    code = {p.relative_to(ROOT).as_posix() for p in (ROOT / "supra").rglob("*.py")}
    kernels = {f"supra/{p.relative_to(ROOT)}" for p in (ROOT / "kernels").rglob("*.py")}
    recipes = {f"supra/{p.relative_to(ROOT)}" for p in (ROOT / "recipes").rglob("*.yaml")}
    assert len(recipes) > 10
    assert {name for name in there if ".dist-info/" not in name} == code | kernels | recipes


@pytest.mark.long  # a minute of imports: five processes, from a folder without the checkout
def test_the_wheel_does_what_the_readme_says(wheel, tmp_path):
    def python(*arguments):
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(tmp_path / "site"), "ACCELERATE_USE_CPU": "true"},
            check=True, capture_output=True, text=True, timeout=300,
        ).stdout  # fmt: skip

    install = ["install", "--no-deps", "--no-index", "--quiet", "--target", "site", str(wheel)]
    python("-m", "pip", *install)
    assert str(tmp_path) in python("-c", "import supra; print(supra.__file__)")
    tiny_checkpoint(tmp_path / "teacher")
    with open(tmp_path / "text.jsonl", "w") as file:
        for number in range(20):
            print(json.dumps({"text": f"The river rises {number} times. " * 9}), file=file)
    python("-m", "supra", "convert", "--model", "teacher", "--out", "student")
    settings = ["--config", "smoke", "student=student", "data.path=text.jsonl", "out=run"]
    python("-m", "accelerate.commands.launch", "--cpu", "-m", "supra.uptrain", *settings)
    load = "AutoModelForCausalLM.from_pretrained('run/final')"
    code = f"import supra; from transformers import AutoModelForCausalLM; print(type({load}))"
    assert "SupraLlamaForCausalLM" in python("-c", code)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("--version",),
        *((name, "--help") for name in ("convert", "inspect", "uptrain", "eval", "diagnose")),
        *((name, "--help") for name in ("generate", "serve", "bench")),
        ("bench", "kernels", "--help"),
        ("uptrain", "--config", "no"),
        ("convert",),
    ],
    ids=" ".join,
)
def test_help_and_mistakes_import_no_torch(arguments):
    code = "import runpy, sys; runpy.run_module('supra', run_name='__main__')"
    last = "import atexit, sys; atexit.register(lambda: print(sorted({'torch', 'transformers'} & "
    last += "set(sys.modules))))"
    result = subprocess.run(
        [sys.executable, "-c", f"{last}; {code}", *arguments], capture_output=True, text=True
    )
    assert result.stdout.splitlines()[-1] == "[]"
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "imports",
    [
        "import supra; from transformers import AutoConfig",
        "from transformers import AutoConfig; import supra",
        "import transformers; import supra; from transformers import AutoConfig",
        "import supra; import transformers.models.auto.modeling_auto; AutoConfig = "
        "transformers.AutoConfig",
        "from supra.configuration import SupraConfig; from transformers import AutoConfig",
    ],
)
@pytest.mark.long  # four seconds each: every order needs a process of its own
def test_models_are_registered_in_any_order(imports):
    code = f"{imports}; AutoConfig.for_model('supra'); print('registered')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "registered\n", result.stderr


def test_version(capsys):
    from supra import __version__
    from supra.cli import main

    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0 and capsys.readouterr().out == f"supra {__version__}\n"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["version"] == __version__


@pytest.mark.parametrize("turned", [False, True], ids=["as it is", "made another error"])
@pytest.mark.parametrize(("signal", "code", "word"), [
    ("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated"),
])  # fmt: skip
def test_a_signal_during_imports_is_one_line(signal, code, word, turned, tmp_path):
    """Imports take seconds, and numpy and transformers turn an interrupt into other errors."""
    script = f"""
import os, runpy, signal, sys

class Interrupt:
    def find_spec(name, path, target=None):
        if name != "torch":
            return
        try:
            os.kill(os.getpid(), signal.{signal})
        except BaseException as error:
            raise RecursionError("of numpy") if {turned} else error

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
sys.meta_path.insert(0, Interrupt)
runpy.run_module("supra", run_name="__main__")
"""
    command = ["uptrain", "--config", "smoke", "student=s", "data.path=p", f"out={tmp_path}/run"]
    result = subprocess.run(
        [sys.executable, "-c", script, *command], capture_output=True, text=True, cwd=ROOT
    )
    assert (result.returncode, result.stderr) == (code, f"supra: {word}\n")
