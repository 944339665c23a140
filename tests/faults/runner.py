"""A command in a child of this process, which has imported everything: half a second a case.

fork() copies the calling thread alone, so nothing here may compute before it.
"""

import hashlib
import os
import resource
import runpy
import shlex
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

SECONDS = 20  # of computing: no input may take longer, however busy the machine is
WAITING = 60  # seconds, for what does not even compute
TIMEOUTS = (signal.SIGXCPU, signal.SIGKILL, signal.SIGALRM)
BYTES = 2**34  # of address space: what a fault makes a command ask for must not fall on the machine


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str
    timed_out: bool = False

    @property
    def errors(self) -> list[str]:
        """The lines that say what was wrong."""
        return [line for line in self.err.splitlines() if line.startswith("supra: error: ")]


def run_command(words: list[str], folder: Path, seconds: int = SECONDS) -> Outcome:
    """`supra …`, or a recipe, with `folder` as the working directory."""

    def command() -> None:
        if words[0].endswith(".py"):
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
        else:
            from supra.cli import main

            main(words)

    return run_forked(command, folder, seconds)


def run_forked(function: Callable[[], None], folder: Path, seconds: int) -> Outcome:
    """What a function prints in a child, and how it ends."""
    log = folder.with_name(f"{folder.name}.log")
    log.mkdir(exist_ok=True)
    child = os.fork()
    if child == 0:
        _in_child(function, folder, log, seconds)
    _, status = os.waitpid(child, 0)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # its own children, if it left any
    out, err = ((log / name).read_text(errors="replace") for name in ("out", "err"))
    timed_out = os.WIFSIGNALED(status) and os.WTERMSIG(status) in TIMEOUTS
    return Outcome(os.waitstatus_to_exitcode(status), out, err, timed_out)


def _in_child(function: Callable[[], None], folder: Path, log: Path, seconds: int) -> None:
    code = 1
    try:
        os.setpgid(0, 0)
        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
        # these end the process in whatever code it hangs
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(WAITING + seconds)
        for number, path in ((0, os.devnull), (1, log / "out"), (2, log / "err")):
            opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            os.dup2(opened, number)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 (as long as the process)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", 1, errors="backslashreplace", closefd=False)  # noqa: SIM115
        os.chdir(folder)
        function()
        code = 0
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def snapshot(folder: Path) -> dict[str, str]:
    """What lies in a folder: a digest by path."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


def words_of(command: str, places: dict[str, Path]) -> list[str]:
    return [word.format(**places) for word in shlex.split(command)]
