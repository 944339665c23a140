"""A tree of dataclasses from a YAML file and `a.b=c` overrides, and back.

Knows nothing of training: unknown keys, wrong types and missing values are errors that name the
full dotted key.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable
from pathlib import Path

import yaml

from supra.errors import UserError, check_choice, shown

MOST_BYTES = 1_000_000  # of a settings file; a text given by mistake would be parsed for minutes


def load(cls: type, path: str | Path, overrides: Iterable[str] = ()):
    """Build `cls` from the YAML file at `path`; an override `a.b=c` replaces one value."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no such config file: {path}")
    if (size := path.stat().st_size) > MOST_BYTES:
        raise UserError(f"{path} is {size} bytes long, and settings take {MOST_BYTES} at most")
    values = parse_yaml(path.read_bytes(), str(path))
    if values is not None and not isinstance(values, dict):
        raise UserError(f"{path} is not a mapping of settings")
    values = values or {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"{shown(override)} is not of the form a.b=c")
        _set(values, key, parse_yaml(text, shown(override)))
    return build(cls, values)


def build(cls: type, values: dict):
    """Build the dataclass `cls` and those inside it from nested dicts."""
    _check_keys(cls, values, "", keys(cls))
    return _build(cls, values, "")


def keys(cls: type, prefix: str = "") -> dict[str, object]:
    """All dotted keys below `cls` with their defaults (dataclasses.MISSING where there is none)."""
    found = {}
    for name, kind in typing.get_type_hints(cls).items():
        inner = _dataclass_of(kind)
        if inner:
            found |= keys(inner, f"{prefix}{name}.")
        else:
            found[prefix + name] = cls.__dataclass_fields__[name].default
    return found


def to_dict(config) -> dict:
    """The tree as plain dicts and lists, as YAML and JSON want it."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def flatten(values: dict, prefix: str = "") -> dict[str, object]:
    """Nested dicts as one dict with dotted keys."""
    flat = {}
    for key, value in values.items():
        inner = isinstance(value, dict)
        flat |= flatten(value, f"{prefix}{key}.") if inner else {prefix + key: value}
    return flat


def _plain(value):
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    return list(value) if isinstance(value, tuple) else value


def parse_yaml(text: str | bytes, where: str):
    """The value of a YAML text; `where` names it in errors.

    Raises UserError, also for a key that occurs twice in a mapping: PyYAML would take the last.
    """
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise UserError(f"{where} is not valid YAML here: lists in lists, too deep") from None
    except Exception as error:  # PyYAML raises other errors for a month 13 or `!!int ''`
        raise UserError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node, deep=False):
        lines = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode):
                lines.setdefault(key.value, []).append(key.start_mark.line + 1)
        for key, places in lines.items():
            if len(places) > 1:
                where = " and ".join(map(str, places))
                raise ValueError(f"{shown(key)} stands in lines {where}: keep one")
        return super().construct_mapping(node, deep)


def _set(values: dict, dotted: str, value) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        inner = values.get(parent)
        # a copy, since a YAML alias is the same dict in two places
        values[parent] = dict(inner) if isinstance(inner, dict) else {}
        values = values[parent]
    values[last] = value


def _check_keys(cls: type, values: dict, prefix: str, known: Iterable[str]) -> None:
    hints = typing.get_type_hints(cls)
    for key, value in values.items():
        dotted = f"{prefix}{key}"[:200]  # for a message of one line
        if key not in hints:
            raise UserError(f"unknown key {dotted}{_nearest(dotted, known, hints)}")
        inner = _dataclass_of(hints[key])
        if inner and isinstance(value, dict):
            _check_keys(inner, value, f"{dotted}.", known)


def _build(cls: type, values: dict, prefix: str):
    hints, arguments = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        dotted, kind = prefix + field.name, hints[field.name]
        inner = _dataclass_of(kind)
        required = field.default is field.default_factory is dataclasses.MISSING
        if field.name in values:
            value = values[field.name]
        elif not required:
            continue
        elif inner:
            value = {}  # what is missing is one of the keys in it
        else:
            raise UserError(f"{dotted} is missing: set it in the config file or {dotted}=...")
        arguments[field.name] = (
            _section(kind, inner, value, dotted) if inner else _convert(kind, value, dotted)
        )
    return cls(**arguments)


def _section(kind, cls: type, value, dotted: str):
    if value is None and isinstance(kind, types.UnionType):
        return None
    value = {} if value is None else value  # `schedule:` with nothing below it
    if not isinstance(value, dict):
        raise UserError(f"{dotted} (={shown(value)}) must be a mapping of settings")
    return _build(cls, value, f"{dotted}.")


def _nearest(dotted: str, known: Iterable[str], siblings: Iterable[str]) -> str:
    """Say which key was meant: judged by the whole path, then by its last part alone."""
    last = dotted.rpartition(".")[2]
    by_last = {key.rpartition(".")[2]: key for key in known}
    near = difflib.get_close_matches(dotted, known, n=1) or [
        by_last[match] for match in difflib.get_close_matches(last, by_last, n=1)
    ]
    hint = f": did you mean {near[0]}?" if near else ""
    return f"{hint} (known here: {', '.join(siblings)})"


def _dataclass_of(kind) -> type | None:
    """The dataclass in a type hint, itself or in `X | None`."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    return next((option for option in options if dataclasses.is_dataclass(option)), None)


def _convert(kind, value, dotted: str):
    """`value` as the type hint `kind` wants it, or UserError."""
    if isinstance(kind, types.UnionType):
        if value is None:
            return None
        (kind,) = (option for option in typing.get_args(kind) if option is not type(None))
    if typing.get_origin(kind) is typing.Literal:
        check_choice(dotted, value, typing.get_args(kind))
        return value
    if typing.get_origin(kind) is tuple:
        return _convert_tuple(kind, value, dotted)
    if kind in (int, float):
        number = _number(kind, value)
        if number is not None and (number % 1 == 0 if kind is int else math.isfinite(number)):
            return kind(number)
    elif isinstance(value, kind):
        return value
    raise UserError(f"{dotted} (={shown(value)}) must be {_NAMES[kind]}")


def _number(kind, value) -> int | float | None:
    """A number from YAML 1.1, which reads 1e-4 as a string and true as what Python calls an int."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if kind is int and isinstance(value, int):
        return value
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _convert_tuple(kind, value, dotted: str) -> tuple:
    items = [value] if isinstance(value, str) else value
    kinds = typing.get_args(kind)
    if not isinstance(items, list | tuple) or (kinds[-1] is not ... and len(items) != len(kinds)):
        size = "" if kinds[-1] is ... else f"{len(kinds)} "
        raise UserError(
            f"{dotted} (={shown(value)}) must be a list of {size}{kinds[0].__name__} values"
        )
    return tuple(_convert(kinds[0], item, f"{dotted}[{i}]") for i, item in enumerate(items))


_NAMES = {
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    str: "a string; in quotes, if it looks like a number or a date",
}
