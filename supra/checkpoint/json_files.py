"""JSON: objects are read with checks, and NaN and infinity are never written."""

import json
import math
from pathlib import Path
from typing import Any

from supra.errors import UserError


def read_fields(file: Path) -> dict[str, Any]:
    """The fields of a JSON config. Raises UserError if the file is missing or not an object."""
    try:
        found = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise UserError(f"there is no {file.name}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file.name} is damaged ({error}): download it again") from error
    if not isinstance(found, dict):
        raise UserError(
            f"{file.name} is not a JSON object but {type(found).__name__}: download it again"
        )
    return found


def to_json(value: Any, indent: int | None = None) -> str:
    """`value` as JSON, with null for numbers that are not finite."""
    return json.dumps(_strict(value), indent=indent, allow_nan=False)


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strict(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(x) for x in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
