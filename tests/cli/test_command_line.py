"""How the command line is built: help, examples, completion, bounds, old spellings, mistakes."""

import os
import re
import shlex
import subprocess
import sys

import pytest
import typer

from supra.checkpoint import opening
from supra.cli import evaluate, main, options
from supra.cli.app import app
from supra.cli.old_eval import renamed
from supra.data.synthetic import LANGUAGES
from tests.cli.test_cli import fails


def commands(command=None, path=()):
    """(words, command) of every command and group, that of `supra` itself first."""
    command = typer.main.get_command(app) if command is None else command
    yield list(path), command
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, (*path, name))


COMMANDS = [(words, command) for words, command in commands() if not hasattr(command, "commands")]
NAMES = [" ".join(words) for words, _ in COMMANDS]


def shown(capsys, *words):
    with pytest.raises(SystemExit) as end:
        main([*words])
    assert end.value.code == 0
    return capsys.readouterr().out


def test_help_names_every_command_under_a_heading(capsys):
    printed = shown(capsys, "--help")
    names = ("convert", "inspect", "uptrain", "eval", "diagnose", "generate", "sample", "serve")
    for name in (*names, "plan", "bench"):
        assert f"\n  {name} " in printed
    for heading in ("Make a model:", "Measure a model:", "Run a model:", "Develop:"):
        assert f"\n{heading}\n" in printed
    assert shown(capsys) == printed == shown(capsys, "-h")


@pytest.mark.parametrize(("words", "command"), COMMANDS, ids=NAMES)
def test_help_explains_every_option(words, command, capsys):
    printed = "".join(shown(capsys, *words, "--help").split())  # lines may break anywhere
    for param in command.params:
        assert param.help[0].isupper() or param.help.startswith(("float32", "0 "))
        assert param.help.endswith(".") and "".join(param.help.split()) in printed
        assert param.metavar or param.is_flag, f"{param.opts} shows no kind of value"
        assert all(name in printed for name in param.opts if name.startswith("-"))


@pytest.mark.parametrize(("words", "command"), COMMANDS, ids=NAMES)
def test_the_example_of_a_command_is_one(words, command, capsys):
    example = command.epilog.replace("\\\n", " ")
    assert shlex.split(example)[: len(words) + 1] == ["supra", *words]
    with command.make_context("supra", shlex.split(example)[len(words) + 1 :]) as context:
        given = [
            x for x in command.params if context.get_parameter_source(x.name).name == "COMMANDLINE"
        ]
    assert given
    assert f"Example:\n  {command.epilog.splitlines()[0]}\n" in shown(capsys, *words, "--help")


def sizes():
    """(words, what the command requires, option) of every option for whole numbers."""
    for words, command in COMMANDS:
        required = []
        for param in command.params:
            if param.required:
                value = "1" if "int" in str(param.type_descriptor.annotation) else "induction"
                value = "1x80GB" if param.name == "gpus" else value
                required += [*(x for x in param.opts if x.startswith("-")), value]
        for param in command.params:
            if "int" in str(param.type_descriptor.annotation):
                yield words, required, param.opts[0]


@pytest.mark.parametrize(("words", "required", "option"), [*sizes()], ids=str)
def test_every_whole_number_has_bounds(words, required, option, capsys):
    line = fails(capsys, *words, *required, option, 10**30)
    assert re.search(rf"{option} \(=10{{30}}\) must be at most \d+$", line)
    line = fails(capsys, *words, *required, option, "many")
    assert f"{option} (='many') must be a whole number" in line or "integers with commas" in line


def test_choices_are_those_of_the_library():
    assert set(options.DTYPES) == set(opening.DTYPES)
    assert set(evaluate.TASKS) == set(LANGUAGES)


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("supra ev", "eval"),
        ("supra eval ", "text ablate task passkey suite"),
        ("supra eval abl", "ablate"),
        ("supra convert --mixer-o", "--mixer-option"),
        ("supra eval task --task m", "mqar"),
        ("supra generate --dtype b", "bfloat16"),
        ("supra uptrain --config rad", "radlads"),
    ],
)
def test_a_shell_completes(typed, offered, monkeypatch, capsys):
    monkeypatch.setenv("_SUPRA_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split(" ")) - 1))
    assert shown(capsys).split() == offered.split()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("--model m --text t --json", "text --model m --text t --json"),
        ("--text t --model m", "text --text t --model m"),
        ("--model m --text t --ablate", "ablate --model m --text t"),
        ("--model m --ablate --text t", "ablate --model m --text t"),
        ("--model m --text t --ablate a,b", "ablate --parts a,b --model m --text t"),
        ("--model m --text t --ablate=a,b", "ablate --parts a,b --model m --text t"),
        ("--model m --task mqar --pairs 2", "task --task mqar --model m --pairs 2"),
        ("--task=mqar --model m", "task --task mqar --model m"),
        ("--model m --task passkey --keys 3", "passkey --model m --keys 3"),
    ],
)
def test_an_old_spelling_of_eval(old, new, capsys):
    assert renamed(["eval", *old.split()]) == ["eval", *new.split()]
    note = capsys.readouterr().err
    assert note.startswith("supra: note: ") and note.endswith(f": supra eval {new}\n")
    assert renamed(["eval", *new.split()]) == ["eval", *new.split()]
    assert capsys.readouterr().err == "", "the new spelling needs no note"


@pytest.mark.parametrize(
    "words", [["eval"], ["eval", "--help"], ["inspect", "--text"], []], ids=str
)
def test_other_commands_stay_as_they_are(words, capsys):
    assert renamed(words) == words and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["convrt"], "unknown supra command 'convrt': did you mean 'convert'? (known: bench, "),
        (["eval"], "supra eval needs a command: text, ablate, task, passkey, suite (supra eval --"),
        (["inspect"], "MODEL is missing: supra inspect needs MODEL (Hub id, folder or GGUF file; "),
        (["convert"], "--model is missing: supra convert needs --model MODEL (Transformer: hub"),
        (["convert", "--modle", "m"], "supra convert has no option --modle: did you mean --model?"),
        (["inspect", "m", "--json=1"], "--json takes no value: write --json alone"),
        (["inspect", "a", "b"], "unexpected argument 'b': supra inspect MODEL [OPTIONS] ("),
        (["convert", "--model"], "--model needs a value, and nothing follows it: --model MODEL"),
        (["convert", "--model", "--out"], "--model needs a value, and --out follows it: --model"),
        (["convert", "--shard-size", "big"], "--shard-size (='big') must be a number"),
        (["diagnose", "./m", "--text", "model"], "model './m': there is no such folder"),
        (["generate", "--dtype", "bf16"], "unknown --dtype 'bf16': did you mean 'bfloat16'?"),
        (["eval", "text", "--keys", "1"], "supra eval text has no option --keys: it belongs to "),
        (["serve", "--port", "1"], "supra serve needs a model before --port: supra serve MODEL --"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(words, line, capsys):
    with pytest.raises(SystemExit) as end:
        main(words)
    printed = capsys.readouterr()
    assert end.value.code == 2 and printed.out == ""
    assert printed.err.startswith(f"supra: error: {line}") and printed.err.count("\n") == 1


def test_help_is_light_and_without_colour():
    """Neither torch nor transformers, and not even rich: `supra --help` answers at once."""
    heavy = {"torch", "transformers", "rich", "pydantic", "yaml"}
    code = "import runpy, sys\ntry: runpy.run_module('supra', run_name='__main__')\n"
    code += f"finally: print(sorted({heavy} & set(sys.modules)), file=sys.stderr)"
    result = subprocess.run(
        [sys.executable, "-c", code, "--help"],
        capture_output=True, text=True, env=os.environ | {"FORCE_COLOR": "1"},
    )  # fmt: skip
    assert result.stderr == "[]\n" and "Make a model:" in result.stdout
    assert "\x1b" not in result.stdout


def test_a_command_that_is_interrupted(monkeypatch, capsys):
    """Typer would end it without a word."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(opening, "find_checkpoint", interrupted)
    with pytest.raises(SystemExit) as end:
        main(["inspect", "model"])
    assert end.value.code == 130 and capsys.readouterr().err == "supra: interrupted\n"
