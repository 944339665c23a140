"""The pages that are made from the code: the command line and the settings of a run."""

import json
from collections.abc import Iterator
from typing import Any

from typer.main import get_command

from supra.cli.app import app
from supra.settings.schema import Node, section, tree
from supra.uptrain import UptrainConfig

CLI = """# Command line

All commands, with their options. A mistake in an option is one line on stderr and exit code 2, and
Ctrl-C ends a command with exit code 130. `supra --install-completion` lets your shell complete
commands and options.
"""
SETTINGS = """# Settings of a run

Every setting of `supra uptrain`. A recipe is a YAML file with this tree, and on the command line a
setting is `section.name=value`. What a recipe leaves out has its default. `supra uptrain --help`
prints the same, and `recipes/schema.json` is the JSON schema.
"""
HIDDEN = ("help", "install_completion", "show_completion")
BOUNDS = {"minimum": "≥ {}", "exclusiveMinimum": "> {}", "exclusiveMaximum": "< {}"}
SHOWN = 10**6  # larger bounds only keep mistakes out


def command_page() -> str:
    """The reference of the command line, from its parser."""
    return "\n".join([CLI, *_commands(get_command(app), None, "supra")])


def _commands(command: Any, parent: Any, name: str) -> Iterator[str]:
    context = command.context_class(command, info_name=name, parent=parent)
    if inner := getattr(command, "commands", None):
        for name, one in inner.items():
            yield from _commands(one, context, name)
        return
    usage = next(x for x in command.get_usage(context).splitlines() if x.strip())
    yield f"## {context.command_path}\n\n{command.help}\n"
    yield f"```text\n{usage.removeprefix('Usage: ')}\n```\n"
    yield "| option | meaning |\n| --- | --- |"
    for param in command.get_params(context):
        if param.name not in HIDDEN and (record := param.get_help_record(context)):
            yield _row(_option(param, record[0]), param.help + _default(record[1]))
    if command.epilog:
        yield f"\n```bash\n{command.epilog}\n```\n"


def _option(param: Any, shown: str) -> str:
    return param.metavar if param.param_type_name == "argument" else shown


def _default(meaning: str) -> str:
    """What stands in brackets behind the meaning of an option."""
    start = meaning.rfind("  [")
    return "" if start < 0 else f" {meaning[start:].strip(' []').capitalize()}."


def settings_page() -> str:
    """The reference of the settings, from their schema."""
    sections: dict[str, tuple[str, Node]] = {}
    parts = [SETTINGS, *_table(tree(UptrainConfig), "", sections)]
    done: set[str] = set()
    while waiting := [title for title in sections if title not in done]:  # sections hold sections
        name, node = sections[waiting[0]]
        parts += [f"\n## {name}\n", node["description"], "", *_table(node, f"{name}.", sections)]
        done.add(waiting[0])
    return "\n".join(parts) + "\n"


def _table(node: Node, prefix: str, sections: dict[str, tuple[str, Node]]) -> list[str]:
    """The rows of a section. New sections in it go into `sections`, by title, with their names."""
    rows = ["| setting | default | meaning |", "| --- | --- | --- |"]
    for name, value in node["properties"].items():
        meaning = value["description"]
        if inner := section(value):
            taken = name in {heading for heading, _ in sections.values()}
            heading = f"{prefix}{name}" if taken else name
            heading, _ = sections.setdefault(inner["title"], (heading, inner))
            link = f"[{heading}](#{heading.replace('.', '')})"
            rows.append(_row(f"{prefix}{name}", "", f"{meaning} See {link}."))
        else:
            default = f"`{json.dumps(value['default'])}`" if "default" in value else "required"
            rows.append(_row(f"{prefix}{name}", default, f"{meaning}{_rule(value)}"))
    return rows


def _rule(value: Node) -> str:
    """The values that a setting takes, where that is not obvious."""
    if "enum" in value:
        return f" One of {', '.join(f'`{x}`' for x in value['enum'])}."
    found = [
        text.format(f"{option[name]:g}")
        for option in (value, *value.get("anyOf", ()))
        for name, text in (BOUNDS | {"maximum": "≤ {}"}).items()
        if abs(option.get(name, SHOWN)) < SHOWN
    ]
    return f" Must be {' and '.join(dict.fromkeys(found))}." if found else ""


def _row(name: str, *cells: str) -> str:
    cells = [cell.replace("|", "\\|").replace("\n", " ") for cell in cells]
    return " | ".join([f"| `{name}`", *cells]) + " |"
