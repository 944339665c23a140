"""What a user can get wrong, said in one line; the commands turn it into exit code 2."""

import difflib
import functools
import reprlib
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A mistake in an argument, a file or a config: one line that names the way out."""


class Diverged(UserError):
    """Training left the finite numbers."""


class _Short(reprlib.Repr):
    """Of a list that holds itself, a number of 5000 digits, or aliases of aliases in YAML."""

    def __init__(self):
        super().__init__()
        self.maxstring = self.maxother = 200
        self.maxlevel = 3

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if abs(x) < 10**40 else f"about 2**{x.bit_length() - 1}"


LARGEST = 2**31 - 1  # of sizes; shapes of tensors overflow soon after
shown = _Short().repr  # a value in a message: as repr has it, but never long


def not_finite(what: str, dtype: object) -> UserError:
    """The error for numbers that overflowed in `dtype`, or were no numbers in the weights."""
    name = str(dtype).removeprefix("torch.")
    way_out = "convert with dtype bfloat16 or float32"
    if name != "float16":  # the others hold whatever a whole model computes
        way_out = "its weights are damaged, download or convert the model again"
    return UserError(f"{what} is not finite in {name}: {way_out}")


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise UserError when `value` is not one of `choices`, naming the nearest and all of them."""
    choices = sorted(choices)
    if value not in choices:
        near = difflib.get_close_matches(shown(value).strip("'"), choices, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"unknown {name} {shown(value)}: {hint}(known: {', '.join(choices)})")


def check_flags(options: object, *names: str) -> None:
    """Raise UserError for an attribute of `options` that is neither true nor false."""
    for name in names:
        if not isinstance(value := getattr(options, name), bool):
            raise UserError(f"{name} (={shown(value)}) must be true or false")


def check_whole(name: str, value: int, least: int, most: int | None = None) -> None:
    """Raise UserError when `value` is no whole number from `least` to `most`; None for LARGEST."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    too_large = whole and value > (LARGEST if most is None else most)
    if not whole or value < least or too_large:
        rule = f"from {least} to {LARGEST if most is None else most}"
        rule = f">= {least}" if most is None and not too_large else rule
        raise UserError(f"{name} (={shown(value)}) must be a whole number {rule}")


class Terminated(SystemExit):
    """SIGTERM or SIGHUP, as an exception: what is half written is cleaned up on its way."""


@contextmanager
def termination() -> Iterator[list[int]]:
    """Raise Terminated in here where SIGTERM or SIGHUP would end the process, and KeyboardInterrupt
    for Ctrl-C; a second one does what it would without us.

    The signal that came is in the list, too: in the middle of an import, numpy and transformers
    make other errors of what is raised.
    """
    previous, received = {}, []

    def handle(number, frame):
        restore()
        received.append(number)
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated(128 + number)

    def restore():
        while previous:
            signal.signal(*previous.popitem())

    if threading.current_thread() is threading.main_thread():  # no other may set handlers
        for name in ("SIGTERM", "SIGHUP", "SIGINT"):  # Windows has no SIGHUP
            number = getattr(signal, name, None)
            # nohup ignores SIGHUP, and what ignores or handles one has its reason
            unhandled = (signal.SIG_DFL, signal.default_int_handler)
            if number is not None and signal.getsignal(number) in unhandled:
                previous[number] = signal.signal(number, handle)
    try:
        yield received
    finally:
        restore()


@contextmanager
def foreign_errors(trouble: str) -> Iterator[None]:
    """What code of others raises, of any kind, becomes a UserError that begins with `trouble`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{trouble}: {type(error).__name__}: {reason}") from error


def command(run: Callable[..., None]) -> Callable[..., None]:
    """Run a command; a user's mistake or a full disk becomes one line on stderr and exit code 2.

    Ctrl-C, SIGTERM and SIGHUP are no mistakes: exit codes 130, 143 and 129, as shells have them.
    """

    @functools.wraps(run)
    def wrapped(*args, **kwargs) -> None:
        received = []
        try:
            with termination() as received:
                run(*args, **kwargs)
        except BaseException as error:
            number = signal.SIGINT if isinstance(error, KeyboardInterrupt) else None
            if number := next(iter(received), number):
                word = "interrupted" if number == signal.SIGINT else "terminated"
                print(f"supra: {word}", file=sys.stderr)
                sys.exit(128 + number)
            if not isinstance(error, UserError | OSError):
                raise
            print(f"supra: error: {' '.join(str(error).split())}", file=sys.stderr)
            sys.exit(2)

    return wrapped
