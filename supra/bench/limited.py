"""Calls functions in another process, which is killed when a call takes too long."""

import gc
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from supra.bench.workers import environment

GRACE = 5.0  # seconds for a killed process to go


class Failed(Exception):
    """A call that raised an error, crashed its process, or took too long; the text says which."""


class OutOfTime(Failed):
    """A call that took too long."""


class Worker:
    """Calls functions one after the other in one process, so that a GPU is opened once and compiled
    kernels are kept.

    A call that fails ends the process, and the next call starts another: after an error, a GPU
    computes nothing more for the same process. What the process prints goes to the file `log`.
    """

    def __init__(self, log: Path, changes: Mapping[str, str | None]):
        self.log, self.changes = log, changes
        self._process: multiprocessing.Process | None = None

    def call(self, function: Callable[..., Any], arguments: tuple, seconds: float) -> Any:
        """function(*arguments). Raises Failed, or OutOfTime after so many seconds."""
        if self._process is None:
            self._start()
        try:
            self._connection.send((function, arguments))
            if not self._connection.poll(seconds):
                raise OutOfTime(f"took more than {seconds:g} s")
            succeeded, value = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(GRACE)
            reason = f"the process ended with {_ending(self._process.exitcode)}"
            self.close()
            raise Failed(reason) from None
        except OutOfTime:
            self.close()
            raise
        if not succeeded:
            self.close()
            raise Failed(value)
        return value

    def close(self) -> None:
        """Kill the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.join(GRACE)
            self._connection.close()
            self._process = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        with environment(self.changes):
            self._process = context.Process(target=_serve, args=(theirs, self.log))
            self._process.start()
        theirs.close()


def _serve(connection: Connection, log: Path) -> None:
    """Answer (function, arguments) with (True, result), or once with (False, reason)."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = True, function(*arguments)
        except Exception as error:  # of any kind: one row must not end the others
            traceback.print_exc()
            answer = False, _one_line(error)
        connection.send(answer)
        gc.collect()  # what a call held must not count for the next
        if not answer[0]:
            return


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return signal.Signals(-code).name
    return f"exit code {code}"
