"""The examples of the documentation: finds them, runs them in this process, or parses them.

A Python block runs. Of a bash block, commands of supra run; what installs, builds or is not ours is
checked as far as it can be. A block behind `<!-- parsed only: reason -->` is parsed and not run.
"""

import argparse
import importlib.util
import re
import shlex
import shutil
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest
from typer.main import get_command

from supra.cli.app import app, main
from supra.uptrain import load_config

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    *(ROOT / name / "README.md" for name in ("kernels", "recipes")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
BLOCK = re.compile(
    r"(?:^<!-- parsed only: (?P<reason>.+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
LANGUAGES = ("bash", "python", "yaml", "text")
# commands that are not ours: they are looked at by nobody
FOREIGN = ("python3 -m venv", ". .venv/", "curl ", "TEACHER=", "pre-commit ")
MODELS = ("HuggingFaceTB/SmolLM2-135M", "./teacher")
SMALL_RUN = [
    *("precision=fp32", "budget.tokens=256", "batch.size=2", "data.sequence_length=32"),
    *("data.eval_documents=2", "eval.tokens=64", "calibrate.tokens=64"),
]
SMALL_TEXT = {"65536": "256", "8192": "512"}  # tokens of a text


class Block(NamedTuple):
    """An example of a page; `reason` is why it is not run."""

    language: str
    text: str
    reason: str | None


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [Block(x["language"], x["text"], x["reason"]) for x in found]


def name(page: Path) -> str:
    """Where a page lies in the repository."""
    return page.relative_to(ROOT).as_posix()


def commands(block: Block) -> list[str]:
    """The commands of a bash block, one a line, without comments."""
    lines = block.text.replace("\\\n", " ").splitlines()
    lines = (re.sub(r"\s+#.*", "", line).strip() for line in lines)
    return [part for line in lines if line for part in line.split(" && ")]


def supra_arguments(command: str) -> list[str] | None:
    """What the command line of supra gets; None for other commands."""
    words = shlex.split(command)
    if words[:2] == ["accelerate", "launch"]:
        return ["uptrain", *words[words.index("supra.uptrain") + 1 :]]
    return words[1:] if words[:1] == ["supra"] else None


def run(arguments: list[str]) -> None:
    """Run a command of supra on the small model, in this folder."""
    arguments = [x.replace(*MODELS) for x in arguments]
    _vacate(arguments)
    if "--config" in arguments:
        arguments = [*arguments, *SMALL_RUN]
        if "extend" in arguments:
            arguments.append("extend.state_passing=2")
        if "recipe.yaml" in arguments or "supra" in arguments:
            arguments += ["align.share=0.5", "distill.share=0.5"]
    if arguments[0] == "sample":
        arguments = [*arguments, "--tokens", "600", "--length", "60"]
    if arguments[0] == "diagnose":
        arguments = [SMALL_TEXT.get(x, x) for x in arguments] + ["--trained-length", "32"]
    try:
        main(arguments)
    except SystemExit as end:
        assert not end.code, arguments


def parse(command: str) -> None:
    """Parse a command with its own parser. Fails where it would not be understood."""
    words = shlex.split(re.sub(r"^[A-Z_]+=\d+ ", "", command))
    if (arguments := supra_arguments(command)) is not None:
        _parse_supra(arguments)
    elif words[0] == "make":
        assert re.search(rf"^{words[-1]}\b.*:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif words[0] == "pip":
        _check_extras(command)
    elif words[0] == "python" and words[1].endswith(".py"):
        _parse_script(words[1], words[2:])
    elif words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2]), f"no module {words[2]}"
    else:
        assert command.startswith(FOREIGN), f"{command!r} is a command that no test knows"


def _vacate(arguments: list[str]) -> None:
    """Remove what a command is to make; an earlier example may have made it."""
    for before, word in zip(["", *arguments], arguments, strict=False):
        if before == "--out" or word.startswith("out="):
            shutil.rmtree(word.removeprefix("out="), ignore_errors=True)
            Path(word).unlink(missing_ok=True)


def _parse_supra(arguments: list[str]) -> None:
    name, command, context = "supra", get_command(app), None
    words = list(arguments)
    while command is not None:
        context = command.make_context(name, words, parent=context)
        groups = hasattr(command, "commands")
        words = [*context._protected_args, *context.args] if groups else []
        name, command, words = command.resolve_command(context, words) if groups else (0, None, 0)
    if arguments[0] == "uptrain":
        load_config(context.params["config"], context.params["overrides"])


def _check_extras(command: str) -> None:
    """Every extra of ours that is named exists."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = re.search(r"\.\[([\w,]+)\]", command)
    assert set(named[1].split(",") if named else ()) <= set(project["optional-dependencies"])


class _Parsed(Exception):
    pass


def _parse_script(path: str, arguments: list[str]) -> None:
    """Parse with the parser that the script makes, and stop it there."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    script = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend((ROOT / path).parent)  # a script may import its neighbours
        spec.loader.exec_module(script)
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser, *_):
        parse_args(parser, arguments)
        raise _Parsed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(_Parsed):
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        script.main()
