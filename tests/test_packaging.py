"""Checkout, wheel and sdist hold and import the same; light imports stay light."""

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from supra.testing import tiny_checkpoint

ROOT = Path(__file__).parent.parent
# what lies beside supra/ in a checkout
BESIDE = {path.stem for path in ROOT.iterdir() if path.is_dir() or path.suffix == ".py"}
BESIDE -= {path.stem for path in (ROOT / "supra").iterdir()}


def test_top_level_kernels_is_not_a_package():
    assert not (ROOT / "kernels" / "__init__.py").exists(), (
        "transformers asks for Hugging Face's package `kernels` by name, and would find ours"
    )


def test_kernels_import_from_anywhere(tmp_path):
    code = "import supra.kernels.linear_attention"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def importable(python, names, **options):
    """The names that another process can import as supra.NAME."""
    code = """
import importlib, sys
def there(name):
    try:
        return importlib.import_module(f"supra.{name}")
    except ModuleNotFoundError:
        return None
print(*filter(there, sys.argv[1:]))
"""
    command = [*python, "-c", code, *sorted(names)]
    result = subprocess.run(command, **options, check=True, capture_output=True, text=True)
    return result.stdout.split()


@pytest.mark.parametrize(
    ("python", "at_the_top"),
    [((), False), ((), True), (("-S",), True)],
    ids=["installed", "installed, at the top", "not installed, at the top"],
)
def test_a_checkout_lends_supra_its_kernels_alone(python, at_the_top, tmp_path):
    """Its tests, its recipes and a second supra are not importable under the name supra."""
    assert {"supra", "kernels", "recipes", "tests", "docs"} <= BESIDE
    place = ROOT if at_the_top else tmp_path
    assert importable([sys.executable, *python], BESIDE, cwd=place) == ["kernels"]


def copy_source(folder):
    """The files that a build needs, without what earlier builds left beside them."""
    for name in ("supra", "kernels", "recipes"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def build(kind, source):
    """The wheel or the sdist of a source folder."""
    code = f"from setuptools.build_meta import build_{kind}; build_{kind}('dist')"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (file,) = (source / "dist").iterdir()
    return file


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build("wheel", copy_source(tmp_path_factory.mktemp("source")))


def contents(wheel):
    with zipfile.ZipFile(wheel) as file:
        return {name: file.read(name) for name in file.namelist()}


def test_the_wheel_has_all_files_and_no_others(wheel):
    code = {p.relative_to(ROOT).as_posix() for p in (ROOT / "supra").rglob("*.py")}
    kernels = {f"supra/{p.relative_to(ROOT)}" for p in (ROOT / "kernels").rglob("*.py")}
    yaml = (ROOT / "recipes").rglob("*.yaml")
    recipes = {f"supra/uptrain/{p.relative_to(ROOT)}" for p in yaml}
    assert len(recipes) > 10
    there = {name for name in contents(wheel) if ".dist-info/" not in name}
    assert there == code | kernels | recipes


def test_the_wheel_of_the_sdist_is_the_same(wheel, tmp_path):
    sdist = build("sdist", copy_source(tmp_path / "source"))
    shutil.unpack_archive(sdist, tmp_path, filter="data")
    again = build("wheel", tmp_path / sdist.name.removesuffix(".tar.gz"))
    assert again.name == wheel.name and contents(again) == contents(wheel)


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """A virtual environment with the wheel; its dependencies are those of the running tests."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    # Only appended to the path: the .pth files there, as that of an editable install, do not run.
    (packages / "dependencies.pth").write_text(str(Path(torch.__file__).parents[1]))
    return folder


@pytest.mark.long  # a minute of imports: six processes, from a folder without the checkout
def test_the_wheel_converts_uptrains_loads_and_generates(environment, tmp_path):
    def run(program, *arguments):
        variables = {"HF_HOME": str(tmp_path / "cache"), "ACCELERATE_USE_CPU": "true"}
        return subprocess.run(
            [environment / "bin" / program, *arguments], cwd=tmp_path, env=os.environ | variables,
            check=True, capture_output=True, text=True, timeout=300,
        ).stdout  # fmt: skip

    assert importable([environment / "bin" / "python"], BESIDE, cwd=tmp_path) == ["kernels"]
    tiny_checkpoint(tmp_path / "teacher")
    with open(tmp_path / "text.jsonl", "w") as file:
        for number in range(20):
            print(json.dumps({"text": f"The river rises {number} times. " * 9}), file=file)
    run("supra", "convert", "--model", "teacher", "--out", "student")
    settings = ["--config", "smoke", "student=student", "data.path=text.jsonl", "out=run"]
    run("python", "-m", "accelerate.commands.launch", "--cpu", "-m", "supra.uptrain", *settings)
    generate = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
prompt = AutoTokenizer.from_pretrained(sys.argv[1])("The river", return_tensors="pt")
tokens = model.generate(**prompt, max_new_tokens=8, min_new_tokens=8)
print(type(model).__name__, tokens.shape[1] - prompt.input_ids.shape[1])
print(sys.modules["supra"].__file__)
"""
    for folder in ("student", "run/final"):
        found, file = run("python", "-c", generate, folder).splitlines()
        assert found == "SupraLlamaForCausalLM 8" and Path(file).is_relative_to(environment)
    assert run("supra", "generate", "--model", "run/final", "--prompt", "The river").strip()


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
        "import supra.model.configuration; from transformers import AutoConfig",
    ],
)
@pytest.mark.long  # four seconds each: every order needs a process of its own
def test_models_are_registered_in_any_order(imports):
    code = f"{imports}; AutoConfig.for_model('supra'); print('registered')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "registered\n", result.stderr


def test_version(capsys, wheel):
    from supra import __version__
    from supra.cli import main

    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0 and capsys.readouterr().out == f"supra {__version__}\n"
    assert wheel.name == f"supra_rnn-{__version__}-py3-none-any.whl"


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
