"""Whether the reference has every public name, and every name in it a docstring."""

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs" / "reference"
COMMANDS = {"__main__", "bench", "cli"}  # no interface for Python


def gaps() -> list[str]:
    """What is missing, one sentence each; empty if nothing is."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in sorted(REFERENCE.glob("*.md")))
    listed = {name: _find(name) for name in re.findall(r"^::: (\S+)$", text, re.MULTILINE)}
    found = [gap for name, thing in listed.items() for gap in _without_docstring(name, thing)]
    for name, thing in public_names():
        if not callable(thing) and f"`{name.rpartition('.')[2]}`" in text:
            continue  # a constant has no docstring of its own, and is explained in the text
        if not any(thing is other for other in listed.values()):
            found.append(f"{name} is public and not in docs/reference/")
    return found


def public_names() -> Iterator[tuple[str, Any]]:
    """Every name in the `__all__` of a room, an operation or a module of supra, and what it is."""
    patterns = ("supra/*.py", "supra/**/__init__.py", "kernels/**/__init__.py")
    for file in sorted({file for pattern in patterns for file in ROOT.glob(pattern)}):
        parts = file.relative_to(ROOT).with_suffix("").parts
        module = ".".join(parts).removesuffix(".__init__")
        if not COMMANDS & {*parts}:
            module = f"supra.{module}" if parts[0] == "kernels" else module
            exported = getattr(importlib.import_module(module), "__all__", ())
            yield from ((f"{module}.{name}", _find(f"{module}.{name}")) for name in exported)


def _find(name: str) -> Any:
    """The object of a dotted name."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def _without_docstring(name: str, thing: Any) -> Iterator[str]:
    """The parts of a public thing that nobody explains; a method may inherit its docstring."""
    if not inspect.getdoc(thing) or _is_generated(thing):
        yield f"{name} has no docstring"
    members = vars(thing).items() if inspect.isclass(thing) else ()
    for member, value in members:
        explains = inspect.isfunction(value) or isinstance(value, property | classmethod)
        if explains and not member.startswith("_") and not inspect.getdoc(getattr(thing, member)):
            yield f"{name}.{member} has no docstring"


def _is_generated(thing: Any) -> bool:
    """Whether dataclasses or typing wrote the docstring, as `Name(field: type, …)`."""
    return inspect.isclass(thing) and (thing.__doc__ or "").startswith(f"{thing.__name__}(")
