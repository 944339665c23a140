"""Reads the fields that a class docstring explains as `name: text`, so that they become a list.

The docstrings of options, settings and results explain their fields without a heading, since
`help()` reads well that way. The reference gets them as a section "Attributes".
"""

import inspect
import re

import griffe

FIELD = re.compile(r"^(\w+(?:, \w+)*): ", re.MULTILINE)


class Fields(griffe.Extension):
    """Adds the heading "Attributes:" above lines `name: text` that explain a class's own fields."""

    def on_class(self, *, cls: griffe.Class, **_) -> None:
        """Rewrite the docstring of one class."""
        if cls.docstring is not None:
            own = {name for name, member in cls.members.items() if member.is_attribute}
            cls.docstring.value = with_heading(inspect.cleandoc(cls.docstring.value), own)


def with_heading(text: str, names: set[str]) -> str:
    """The docstring with its fields, and whatever follows them in the paragraph, in a section."""
    paragraphs = text.split("\n\n")
    for number, paragraph in enumerate(paragraphs):
        match = FIELD.match(paragraph)
        if match and set(match[1].split(", ")) <= names:
            lines = "\n".join(f"    {line}" if line else line for line in paragraph.splitlines())
            paragraphs[number] = f"Attributes:\n{lines}"
    return "\n\n".join(paragraphs)
