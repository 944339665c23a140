"""Lets SIGTERM and SIGINT end a run between two steps."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Turn the first SIGTERM or SIGINT into a request to stop; a second one has its usual
    effect."""
    received, previous = [], {}

    def handle(number, frame):
        received.append(number)
        restore()

    def restore():
        while previous:
            signal.signal(*previous.popitem())

    for number in (signal.SIGTERM, signal.SIGINT):
        previous[number] = signal.signal(number, handle)
    try:
        yield lambda: bool(received)
    finally:
        restore()
