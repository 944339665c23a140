"""The pages that are made from the code: the command line and the settings of a run."""

import argparse
import ast
import dataclasses
import inspect
import io
import json
import tokenize
import typing

from supra.cli.app import build_parser
from supra.uptrain import config as settings
from supra.uptrain.tree import keys

CLI = """# Command line

All commands, with their options. A mistake in an option is one line on stderr and exit code 2.
Ctrl-C ends a command with exit code 130.
"""
SETTINGS = """# Settings of a run

Every setting of `supra uptrain`, made from `supra/uptrain/config.py`. A recipe is a YAML file with
this tree; on the command line a setting is `section.name=value`. What a recipe leaves out has the
default. `null` in YAML is no value.
"""


def command_page() -> str:
    """The reference of the command line, from the parser."""
    parts = [CLI]
    for words, parser in _commands(build_parser(), ["supra"]):
        parts.append(f"## {' '.join(words)}\n\n{parser.description or ''}\n")
        parts.append(f"```text\n{parser.format_help()}```\n")
    return "\n".join(parts)


def _commands(parser: argparse.ArgumentParser, words: list[str]):
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                if inner.add_help:  # the others parse their own arguments
                    yield from _commands(inner, [*words, name])
            return
    yield words, parser


def settings_page() -> str:
    """The reference of the settings, from the tree of dataclasses."""
    parts = [SETTINGS, _table(settings.UptrainConfig, "")]
    for name, kind in typing.get_type_hints(settings.UptrainConfig).items():
        if inner := _dataclass(kind):
            parts += [f"## {name}\n", inspect.getdoc(inner) + "\n", _table(inner, f"{name}.")]
    return "\n".join(parts)


def _table(cls: type, prefix: str) -> str:
    lines = ["| setting | default | |", "| --- | --- | --- |"]
    comments = {}
    for base in reversed(cls.__mro__[:-1]):
        comments |= _comments(base)
    for key, default in keys(cls, prefix).items():
        name = key.removeprefix(prefix)
        if prefix or "." not in name:
            shown = "required" if default is dataclasses.MISSING else f"`{json.dumps(default)}`"
            lines.append(f"| `{key}` | {shown} | {comments.get(name, '')} |")
    return "\n".join(lines) + "\n"


def _comments(cls: type) -> dict[str, str]:
    """The comment behind each field."""
    source = inspect.getsource(cls)
    fields = {x.lineno: x.target.id for x in ast.walk(ast.parse(source)) if type(x) is ast.AnnAssign}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = (x for x in tokens if x.type == tokenize.COMMENT)
    return {fields[x.start[0]]: x.string.lstrip("# ") for x in comments if x.start[0] in fields}


def _dataclass(kind) -> type | None:
    options = typing.get_args(kind) or (kind,)
    return next((x for x in options if dataclasses.is_dataclass(x)), None)
