"""Lets SIGTERM, SIGINT and SIGUSR1 end a run between two steps."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

ENDING = (signal.SIGTERM, signal.SIGINT)
# what schedulers send some time before they end a job; Windows has none
WARNING = (signal.SIGUSR1,) if hasattr(signal, "SIGUSR1") else ()


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Turn SIGUSR1 and the first SIGTERM or SIGINT into a request to stop; a second SIGTERM or
    SIGINT has its usual effect.

    Every SIGUSR1 is a request, because a process may get it from the scheduler and again from its
    launcher.
    """
    received, previous = [], {}

    def handle(number, frame):
        received.append(number)
        if number in ENDING:
            restore(ENDING)

    def restore(numbers):
        for number in previous.keys() & set(numbers):
            signal.signal(number, previous.pop(number))

    for number in ENDING + WARNING:
        previous[number] = signal.signal(number, handle)
    try:
        yield lambda: bool(received)
    finally:
        restore(ENDING + WARNING)
