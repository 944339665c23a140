"""What Typer finds wrong with a command line, said in one line."""

import difflib
from typing import Any

import typer


def explain(error: typer.TyperException) -> str:
    """The option, the rule and the way out."""
    if isinstance(error, typer.BadParameter):
        return error.message or _missing(error.param, error.ctx.command_path)
    if (name := getattr(error, "option_name", None)) is not None:
        return _unknown(name, error.ctx)
    return error.format_message()


def _missing(param: Any, command: str) -> str:
    argument = param.param_type_name == "argument"
    name = param.metavar if argument else param.opts[0]
    words = name if argument else f"{name} {param.metavar}"
    return f"{name} is missing: {command} needs {words} ({param.help.rstrip('.')})"


def _unknown(name: str, context: typer.Context) -> str:
    """Names the commands beside this one that have the option, or else the nearest option."""
    path = context.command_path
    if beside := _owners(name, context):
        hint = f"it belongs to {' and '.join(beside)}"
    else:
        params = context.command.get_params(context)
        known = {x.lstrip("-"): x for param in params for x in param.opts if x.startswith("-")}
        near = difflib.get_close_matches(name.lstrip("-"), known, n=1)
        hint = f"did you mean {known[near[0]]}?" if near else ""
    see = f"{path} --help lists its options"
    return f"{path} has no option {name}: {f'{hint} ({see})' if hint else see}"


def _owners(name: str, context: typer.Context) -> list[str]:
    """The commands of the same group that have the option."""
    group = context.parent
    if group is None or group.parent is None:  # the commands of supra itself have little in common
        return []
    return [
        f"{group.command_path} {command}"
        for command, found in group.command.commands.items()
        if any(name in param.opts for param in found.params)
    ]
