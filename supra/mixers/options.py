"""A mixer's options out of the values that a user or a checkpoint gives."""

from typing import Any, TypeVar

from supra.settings.model import from_yaml
from supra.settings.reading import one_line

Options = TypeVar("Options")


def read_options(kind: type[Options], values: dict[str, Any]) -> Options:
    """The options of this class, each with a type and bounds that it states for itself.

    Raises UserError for a wrong value.
    """
    with one_line(kind):
        return kind(**from_yaml(values))
