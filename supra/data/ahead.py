"""Work on items ahead of the time when they are needed."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from itertools import islice
from typing import TypeVar

T, U = TypeVar("T"), TypeVar("U")


def ahead(
    act: Callable[[T], U], items: Iterable[T], executor: Executor | None, count: int
) -> Iterator[U]:
    """`act` of each item, in order. With an executor, it is busy with up to `count` items ahead."""
    if executor is None:
        yield from map(act, items)
        return
    items = iter(items)
    waiting = deque(executor.submit(act, item) for item in islice(items, count))
    while waiting:
        found = waiting.popleft().result()
        waiting.extend(executor.submit(act, item) for item in islice(items, 1))
        yield found
