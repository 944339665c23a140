"""The JSON schema of settings, and what it says of a single value."""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from pydantic import TypeAdapter

Node = dict[str, Any]
"""A schema, or a part of one: of a section, or of a value."""

DIALECT = "https://json-schema.org/draft/2020-12/schema"
WORDS = {
    "integer": "a whole number",
    "number": "a finite number",
    "string": "a string",
    "boolean": "true or false",
    "null": "null",
    "object": "a mapping of settings",
}
PLURALS = {"number": "numbers", "string": "strings", "object": "mappings of settings"}


def json_schema(kind: type, title: str) -> Node:
    """The schema of a settings file, for editors and other tools.

    No key is required in it: what is missing in the file can stand on the command line.
    """
    schema = TypeAdapter(kind).json_schema()
    for part in (schema, *schema.get("$defs", {}).values()):
        part.pop("required", None)
        for node in (part, *part["properties"].values()):
            node.pop("title", None)  # pydantic's: the key in other letters
    return {"$schema": DIALECT, "title": title, **schema}


@cache
def tree(kind: type) -> Node:
    """The schema with every section in its place instead of a reference to it."""
    schema = TypeAdapter(kind).json_schema()
    return _inline(schema, schema.get("$defs", {}))


def node_at(node: Node, path: Sequence[str | int]) -> Node:
    """The part of a tree at this path of keys and places in lists."""
    for part in path:
        if isinstance(part, str):
            node = section(node)["properties"][part]
        else:
            array = next(x for x in _options(node) if x.get("type") == "array")
            node = array["prefixItems"][part] if "prefixItems" in array else array["items"]
    return node


def section(node: Node) -> Node | None:
    """The section that a value may be, or a list of sections may hold; None for other values."""
    options = [x.get("items", x) for x in _options(node)]
    return next((x for x in options if "properties" in x), None)


def keys(node: Node, prefix: str = "") -> Iterator[str]:
    """All dotted keys of a tree, of sections and of what is in them."""
    for name, inner in node["properties"].items():
        yield prefix + name
        if found := section(inner):
            yield from keys(found, f"{prefix}{name}.")


def rule(node: Node) -> str:
    """What a value must be: "a whole number from 1 to 64"."""
    if "anyOf" in node:
        found = [rule(x) for x in node["anyOf"]]
        null = ", or null" if "null" in found else ""
        return " or ".join(x for x in found if x != "null") + null
    if "enum" in node:
        return " or ".join(node["enum"])
    if node["type"] == "array":
        items = node.get("prefixItems") or [node["items"]]
        count = f"{len(items)} " if "prefixItems" in node else ""
        return f"a list of {count}{PLURALS[items[0]['type']]}"
    return WORDS[node["type"]] + _bounds(node)


def _bounds(node: Node) -> str:
    whole, low, high = (node.get(x) for x in ("type", "minimum", "maximum"))
    if whole == "integer" and low is not None and high is not None:
        return f" from {low} to {high}"
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = " and ".join(f"{sign} {node[x]}" for x, sign in signs.items() if x in node)
    return f" {bounds}" if bounds else ""


def _options(node: Node) -> list[Node]:
    return node.get("anyOf", [node])


def _inline(node: Any, definitions: Node) -> Any:
    if isinstance(node, list):
        return [_inline(x, definitions) for x in node]
    if not isinstance(node, dict):
        return node
    referred = definitions[node["$ref"].rpartition("/")[2]] if "$ref" in node else {}
    own = {name: x for name, x in node.items() if name not in ("$ref", "$defs")}
    return {name: _inline(x, definitions) for name, x in {**referred, **own}.items()}
