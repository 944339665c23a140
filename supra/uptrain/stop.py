"""Lets SIGTERM, SIGINT and SIGUSR1 end a run between two steps."""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

ENDING = (signal.SIGTERM, signal.SIGINT)
# What schedulers send some time before they end a job. A process may get it from the scheduler and
# again from its launcher, so that none of them may end it. Windows has no such signal.
WARNING = (signal.SIGUSR1,) if hasattr(signal, "SIGUSR1") else ()


@contextmanager
def noted(numbers: Sequence[int], once: bool = False) -> Iterator[list[int]]:
    """Inside, these signals are only added to the list.

    once: the first of them is, and a second one has its usual effect.
    """
    received: list[int] = []
    previous: dict[int, Any] = {}

    def handle(number, frame):
        received.append(number)
        if once:
            restore()

    def restore():
        while previous:
            signal.signal(*previous.popitem())

    for number in numbers:
        previous[number] = signal.signal(number, handle)
    try:
        yield received
    finally:
        restore()
