"""Settings as a tree of lines for a terminal: key, default and meaning."""

import json
import textwrap
from collections.abc import Iterator

from supra.settings.schema import Node, section, tree

WIDTH = 100  # characters of a line
COLUMN = 34  # where the meaning begins
INDENT = "  "


def outline(kind: type) -> str:
    """All settings of this class with defaults and descriptions, one or more lines each.

    A section that stands in several places is shown in the first of them.
    """
    return "\n".join(_lines(tree(kind), INDENT, {}))


def _lines(node: Node, indent: str, shown: dict[str, str], prefix: str = "") -> Iterator[str]:
    for name, value in node["properties"].items():
        inner, meaning = section(value), value["description"]
        if inner is None:
            default = json.dumps(value["default"]) if "default" in value else "(required)"
            choices = f" One of {', '.join(value['enum'])}." if "enum" in value else ""
            yield from _entry(f"{indent}{name} = {default}", meaning + choices)
            continue
        off = " Off by default." if "default" in value else ""
        first = shown.setdefault(inner["title"], prefix + name)
        again = f" Takes what {first} takes." if first != prefix + name else ""
        yield from _entry(f"{indent}{name}:", meaning + off + again)
        if not again:
            yield from _lines(inner, indent + INDENT, shown, f"{prefix}{name}.")


def _entry(head: str, meaning: str) -> Iterator[str]:
    lines = textwrap.wrap(meaning, WIDTH - COLUMN)
    if len(head) >= COLUMN:
        yield head
        head = ""
    for line in lines:
        yield f"{head:<{COLUMN}}{line}"
        head = ""
