"""The settings of a run out of a YAML file and `a.b=c` overrides, checked."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from supra.errors import UserError, shown
from supra.settings.reading import read
from supra.settings.yaml_text import parse_yaml
from supra.uptrain.config import UptrainConfig
from supra.uptrain.rules import check

MAX_BYTES = 1_000_000  # of a settings file; a text given by mistake would be parsed for minutes


def load(path: str | Path, overrides: Sequence[str] = ()) -> UptrainConfig:
    """The settings of the YAML file at `path`; an override `a.b=c` replaces one value.

    Raises UserError.
    """
    return build(given(path, overrides))


def given(path: str | Path, overrides: Sequence[str]) -> dict[str, Any]:
    """What the file and the overrides say, not yet checked. Raises UserError."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no such config file: {path}")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise UserError(f"{path} is {size} bytes long, and settings take {MAX_BYTES} at most")
    values = parse_yaml(path.read_bytes(), str(path))
    if values is not None and not isinstance(values, dict):
        raise UserError(f"{path} is not a mapping of settings")
    values = values or {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"{shown(override)} is not of the form a.b=c")
        _set(values, key, parse_yaml(text, shown(override)))
    return values


def build(values: dict[str, Any]) -> UptrainConfig:
    """The settings of nested dicts, each checked by itself and with the others.

    Raises UserError.
    """
    config = read(UptrainConfig, values)
    check(config)
    return config


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with dotted keys."""
    flat = {}
    for key, value in values.items():
        inner = isinstance(value, dict)
        flat |= flatten(value, f"{prefix}{key}.") if inner else {prefix + key: value}
    return flat


def _set(values: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        inner = values.get(parent)
        # a copy, since a YAML alias is the same dict in two places
        values[parent] = dict(inner) if isinstance(inner, dict) else {}
        values = values[parent]
    values[last] = value
