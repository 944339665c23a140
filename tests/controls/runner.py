"""pytest on a copy of the source, in a child of a process that has imported what takes seconds."""

import importlib
import json
import os
import sys
from pathlib import Path

import pytest

# not supra itself, whose copy has the bug
SLOW_IMPORTS = (
    "tests.conftest",  # first: it sets variables that others read
    *("torch", "triton", "transformers.models.llama.modeling_llama", "transformers.generation"),
    *("transformers.models.auto.modeling_auto", "datasets", "accelerate", "peft", "hypothesis"),
)
ASSERTIONS = (AssertionError, pytest.fail.Exception)  # the second: a test that wants an error


def import_slow_modules() -> None:
    for name in SLOW_IMPORTS:
        importlib.import_module(name)


def run_tests(root: Path, tests: tuple[str, ...] | list[str]) -> dict[str, str]:
    """How each test ended: "passed", "assertion", or the name of another exception.

    Tests that did not run are missing. Nothing in this process may have computed before: a fork
    copies the calling thread alone.
    """
    file = root.parent / "outcomes.jsonl"
    file.touch()
    child = os.fork()
    if child == 0:
        _run_in_child(root, tests, file)
    os.waitpid(child, 0)
    return dict(json.loads(line) for line in file.read_text(encoding="utf-8").splitlines())


def _run_in_child(root: Path, tests: tuple[str, ...] | list[str], file: Path) -> None:
    try:
        log = os.open(root.parent / "log", os.O_CREAT | os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(root)
        sys.path[0] = str(root)
        sys.dont_write_bytecode = True
        for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
            del sys.modules[name]
        options = ["-q", "-m", "", "-p", "no:cacheprovider", "-p", "no:xdist"]
        pytest.main([*options, *tests], plugins=[_Outcomes(file)])
    finally:
        os._exit(0)


class _Outcomes:
    """A plugin of pytest that writes how each test ended."""

    def __init__(self, file: Path):
        self.file = file

    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo) -> None:
        if call.excinfo is not None:
            asserted = call.when == "call" and call.excinfo.errisinstance(ASSERTIONS)
            self._write(item, "assertion" if asserted else call.excinfo.typename)
        elif call.when == "call":
            self._write(item, "passed")

    def _write(self, item: pytest.Item, outcome: str) -> None:
        with self.file.open("a", encoding="utf-8") as file:
            print(json.dumps([item.nodeid, outcome]), file=file)
