"""What a user can get wrong, said in one line; the commands turn it into exit code 2."""

import difflib
import functools
import os
import reprlib
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A mistake in an argument, a file or a config: one line that names the way out."""


class Diverged(UserError):
    """Training gave numbers that are not finite."""


class _Short(reprlib.Repr):
    """Short even for a list that contains itself, a number of 5000 digits, or nested YAML
    aliases."""

    def __init__(self):
        super().__init__()
        self.maxstring = self.maxother = 200
        self.maxlevel = 3

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if abs(x) < 10**40 else f"about 2**{x.bit_length() - 1}"


LARGEST = 2**31 - 1  # of sizes; shapes of tensors overflow soon after
shown = _Short().repr  # a value in a message: its repr, but never long


def not_finite(what: str, dtype: object) -> UserError:
    """The error for numbers that overflowed in `dtype`, or came from damaged weights."""
    name = str(dtype).removeprefix("torch.")
    way_out = "convert with dtype bfloat16 or float32"
    if name != "float16":  # the range of other dtypes suffices for every sound model
        way_out = "its weights are damaged, download or convert the model again"
    return UserError(f"{what} is not finite in {name}: {way_out}")


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise UserError when `value` is not one of `choices`, naming the nearest and all of them."""
    choices = sorted(choices)
    if value not in choices:
        near = difflib.get_close_matches(shown(value).strip("'"), choices, n=1)
        hint = f": did you mean {near[0]!r}?" if near else ""
        raise UserError(f"unknown {name} {shown(value)}{hint} (known: {', '.join(choices)})")


def check_whole(name: str, value: int, minimum: int, maximum: int | None = None) -> None:
    """Raise UserError unless `value` is whole, from `minimum` to `maximum` (None: LARGEST)."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    too_large = whole and value > (LARGEST if maximum is None else maximum)
    if not whole or value < minimum or too_large:
        rule = f"from {minimum} to {LARGEST if maximum is None else maximum}"
        rule = f">= {minimum}" if maximum is None and not too_large else rule
        raise UserError(f"{name} (={shown(value)}) must be a whole number {rule}")


class Terminated(SystemExit):
    """SIGTERM or SIGHUP as an exception, so that half-written files are cleaned up."""


@contextmanager
def termination() -> Iterator[list[int]]:
    """Inside, raise Terminated for SIGTERM and SIGHUP, and KeyboardInterrupt for Ctrl-C. A second
    signal has its usual effect.

    The list also receives the signal: during an import, numpy and transformers turn what is raised
    into other errors.
    """
    previous, received = {}, []
    hook_before = sys.unraisablehook

    def handle(number, frame):
        restore()
        received.append(number)
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated(128 + number)

    def arm():
        for name in ("SIGTERM", "SIGHUP", "SIGINT"):  # Windows has no SIGHUP
            number = getattr(signal, name, None)
            # leave signals alone that are ignored (nohup) or already have a handler
            unhandled = (signal.SIG_DFL, signal.default_int_handler)
            if number is not None and signal.getsignal(number) in unhandled:
                previous[number] = signal.signal(number, handle)

    def restore():
        while previous:
            signal.signal(*previous.popitem())

    def unraisable(ignored):
        """Python ignores what is raised in a finalizer or a weak reference's callback. A signal
        that came there is sent again a moment later, when Python has left it."""
        if not received or not isinstance(ignored.exc_value, KeyboardInterrupt | Terminated):
            return hook_before(ignored)
        arm()
        threading.Timer(0.01, os.kill, (os.getpid(), received.pop())).start()

    main = threading.current_thread() is threading.main_thread()  # no other may set handlers
    if main:
        arm()
        sys.unraisablehook = unraisable
    try:
        yield received
    finally:
        if main:
            restore()
            sys.unraisablehook = hook_before


@contextmanager
def foreign_errors(trouble: str) -> Iterator[None]:
    """Turn any error of third-party code into a UserError that begins with `trouble`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{trouble}: {type(error).__name__}: {reason}") from error


def command(run: Callable[..., None]) -> Callable[..., None]:
    """Run a command; a user's mistake or a full disk becomes one line on stderr and exit code 2.

    Ctrl-C, SIGTERM and SIGHUP give the exit codes that shells expect: 130, 143 and 129.
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
