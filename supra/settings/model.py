"""The base of every section of settings."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator

from supra.errors import shown

# also for dataclasses, which say for themselves that they are frozen
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class Settings(BaseModel, frozen=True):
    """A section of settings, frozen. A value of another type is refused: `true` is no number, and
    `"7"` is none either.

    Each field has a description and its bounds; `supra.settings.reading` says in our own words what
    is wrong.
    """

    model_config = STRICT

    @model_validator(mode="before")
    @classmethod
    def _from_yaml(cls, values: Any) -> Any:
        """`schedule:` with nothing below it is null to YAML, and means the defaults."""
        values = {} if values is None else values
        return from_yaml(values) if isinstance(values, dict) else values


def from_yaml(values: dict[Any, Any]) -> dict[str, Any]:
    """The values as Python has them: a whole number is an int however it is written (7.0, 5e6), a
    list is a tuple, and every key is a text, so that an unknown one can be named."""
    return {_key(name): _value(value) for name, value in values.items()}


def _key(name: Any) -> str:
    return shown(name) if isinstance(name, int) else str(name)  # an int may have 5000 digits


def _value(value: Any) -> Any:
    # larger floats are too coarse to count with; they stay as they were written
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return tuple(value) if isinstance(value, list) else value


def _one_or_more(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


# several names, or one without the brackets of a list
Names = Annotated[
    tuple[str, ...], BeforeValidator(_one_or_more, json_schema_input_type=str | tuple[str, ...])
]
