"""What a user can get wrong, said in one line; the commands turn it into exit code 2."""

import difflib
import functools
import sys
from collections.abc import Callable, Iterable


class UserError(ValueError):
    """A mistake in an argument, a file or a config: one line that names the way out."""


class Diverged(UserError):
    """Training left the finite numbers."""


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise UserError when `value` is not one of `choices`, naming the nearest and all of them."""
    choices = sorted(choices)
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"unknown {name} {value!r}: {hint}(known: {', '.join(choices)})")


def check_flags(options: object, *names: str) -> None:
    """Raise UserError for an attribute of `options` that is neither true nor false."""
    for name in names:
        if not isinstance(value := getattr(options, name), bool):
            raise UserError(f"{name} (={value!r}) must be true or false")


def check_whole(name: str, value: int, least: int, most: int | None = None) -> None:
    """Raise UserError when `value` is no whole number from `least` to `most`; None for no end."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        rule = f">= {least}" if most is None else f"from {least} to {most}"
        raise UserError(f"{name} (={value!r}) must be a whole number {rule}")


def command(run: Callable[..., None]) -> Callable[..., None]:
    """Run a command; a user's mistake or a full disk becomes one line on stderr and exit code 2.

    Ctrl-C is no mistake: exit code 130, as shells have it.
    """

    @functools.wraps(run)
    def wrapped(*args, **kwargs) -> None:
        try:
            run(*args, **kwargs)
        except (UserError, OSError) as error:
            print(f"supra: error: {' '.join(str(error).split())}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("supra: interrupted", file=sys.stderr)
            sys.exit(130)

    return wrapped
