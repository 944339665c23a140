"""A mixer's options out of the values that a user or a checkpoint gives."""

from typing import Any, NamedTuple, TypeVar

from supra.errors import UserError, shown
from supra.settings.model import from_yaml
from supra.settings.reading import one_line

Options = TypeVar("Options")


class Form(NamedTuple):
    """What the option `form` of a mixer means for its other options."""

    fixed: dict[str, Any]  # a form has these values and no others
    defaults: dict[str, Any]


def read_options(kind: type[Options], values: dict[str, Any]) -> Options:
    """The options of this class, each with a type and bounds that it states for itself. A class
    with an option `form` has a table `forms`.

    Raises UserError for a wrong value.
    """
    values = from_yaml(values)
    if isinstance(name := values.get("form"), str):
        values = _with_form(name, kind.forms.get(name, Form({}, {})), values)
    with one_line(kind):
        return kind(**values)


def _with_form(name: str, form: Form, values: dict[str, Any]) -> dict[str, Any]:
    for option, value in form.fixed.items():
        if option in values and values[option] != value:
            raise UserError(
                f"{option} (={shown(values[option])}) must be {shown(value)} in the form {name!r}: "
                f"leave {option} out"
            )
    return form.defaults | form.fixed | values
