"""Settings out of nested dicts; a mistake is one line with the key, the value and the rule."""

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from supra.errors import UserError, check_choice, shown
from supra.settings.model import Settings
from supra.settings.schema import Node, keys, node_at, rule, section, tree

S = TypeVar("S", bound=Settings)
UNKNOWN = "extra_forbidden"  # what pydantic calls a key that is none
LONGEST_KEY = 200  # characters of a key in a message


def read(kind: type[S], values: dict[Any, Any]) -> S:
    """The settings of this class. Raises UserError."""
    with one_line(kind):
        return kind.model_validate(values)


@contextmanager
def one_line(kind: type) -> Iterator[None]:
    """Turn pydantic's list of mistakes in the settings `kind` into a UserError for one of them."""
    mistakes = []
    try:
        yield
    except ValidationError as error:
        mistakes = error.errors(include_url=False)
    if mistakes:
        unknown = [mistake for mistake in mistakes if mistake["type"] == UNKNOWN]
        _refuse(tree(kind), (unknown or mistakes)[0])


def _refuse(settings: Node, mistake: ErrorDetails) -> NoReturn:
    path, value = mistake["loc"], mistake["input"]
    if mistake["type"] == "value_error":  # a rule of our own between the fields of a section
        raise mistake["ctx"]["error"]
    if mistake["type"] == UNKNOWN:
        _refuse_key(settings, path)
    if mistake["type"] == "missing" and isinstance(path[-1], str):
        _refuse_gap(settings, path)
    if mistake["type"] == "missing":  # in a list that is too short
        path = path[:-1]
    _refuse_value(_dotted(path), value, node_at(settings, path))


def _refuse_key(settings: Node, path: tuple[str | int, ...]) -> NoReturn:
    """Say which key was meant: judged by the whole path, then by its last part alone; without
    sections in the path the other way round."""
    # a place in a list is left out, because keys are the same in all places
    *parents, last = (part[:LONGEST_KEY] for part in path if isinstance(part, str))
    dotted, known = ".".join((*parents, last)), list(keys(settings))
    by_last = {}
    for key in sorted(known, key=lambda key: key.count(".")):  # the one in the fewest sections
        by_last.setdefault(key.rpartition(".")[2], key)
    whole = difflib.get_close_matches(dotted, known, n=1)
    part = [by_last[match] for match in difflib.get_close_matches(last, by_last, n=1)]
    near = whole or part if parents else part or whole
    hint = f": did you mean {near[0]}?" if near else ""
    here = ", ".join(section(node_at(settings, parents))["properties"])
    raise UserError(f"unknown key {dotted}{hint} (known here: {here})")


def _refuse_gap(settings: Node, path: tuple[str | int, ...]) -> NoReturn:
    """Of a section, one of the keys in it is missing."""
    while inner := section(node_at(settings, path)):
        path = (*path, inner["required"][0])
    key = _dotted(path)
    override = "" if any(isinstance(part, int) for part in path) else f" or {key}=..."
    raise UserError(f"{key} is missing: set it in the config file{override}")


def _refuse_value(key: str, value: Any, node: Node) -> NoReturn:
    value = list(value) if isinstance(value, tuple) else value  # as it was given
    if "enum" in node:
        check_choice(key, value, node["enum"])
    hint = (
        "; in quotes, if it looks like a number or a date" if node.get("type") == "string" else ""
    )
    raise UserError(f"{key} (={shown(value)}) must be {rule(node)}{hint}")


def _dotted(path: tuple[str | int, ...]) -> str:
    """`tune.optimizer.betas[1]`."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return "".join(parts).removeprefix(".")
