"""Runs functions in fresh processes, with changed environment variables."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
Result = TypeVar("Result")


def run_parallel(
    function: Callable[[Item], Result],
    items: list[Item],
    processes: int,
    changes: Mapping[str, str | None],
    title: str,
) -> list[Result]:
    """[function(item) for item in items], in processes with `changes` to their environment.

    Triton reads TRITON_INTERPRET when a kernel is defined, so this process cannot change it.
    """
    with (
        environment(changes),
        ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool,
    ):
        results = pool.map(function, items)
        return list(tqdm(results, title, len(items), leave=False, disable=None))


@contextmanager
def environment(changes: Mapping[str, str | None]) -> Iterator[None]:
    """Inside, environment variables are changed; None removes one."""
    before = {name: os.environ.get(name) for name in changes}
    try:
        _set(changes)
        yield
    finally:
        _set(before)


def _set(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
