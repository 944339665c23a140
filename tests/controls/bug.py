"""A bug that is planted on purpose, and the tests that must fail because of it."""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.controls.runner import run_tests

ROOT = Path(__file__).parents[2]
COPIED = ("supra", "kernels", "recipes", "tests", "pyproject.toml")


@dataclass(frozen=True)
class Bug:
    """One change of the source: `right` stands once in `file`, and `wrong` takes its place."""

    name: str
    sentence: str  # what the wrong code does
    file: str
    right: str
    wrong: str
    tests: tuple[str, ...]  # as pytest names them; each must fail by an assertion


def plant(bug: Bug, root: Path) -> None:
    """Plant the bug in the source under `root`. Raises ValueError if its place is not found."""
    path = root / bug.file
    source = path.read_text(encoding="utf-8")
    if (found := source.count(bug.right)) != 1:
        raise ValueError(f"{bug.name}: {bug.file} has {bug.right!r} {found} times, not once")
    path.write_text(source.replace(bug.right, bug.wrong), encoding="utf-8")


def not_caught(bug: Bug) -> list[str]:
    """The bug's tests that do not catch it, one line each with the reason."""
    outcomes = outcomes_of(bug.tests, bug)
    reasons = [(test, why_not_caught(test, outcomes)) for test in bug.tests]
    return [f"{test} {reason}" for test, reason in reasons if reason]


def outcomes_of(tests: tuple[str, ...] | list[str], bug: Bug | None = None) -> dict[str, str]:
    """How each test ends in a copy of the source, with or without a bug."""
    with tempfile.TemporaryDirectory(prefix="supra-control-") as folder:
        root = Path(folder) / "source"
        for name in COPIED:
            if (ROOT / name).is_dir():
                no_caches = shutil.ignore_patterns("__pycache__")
                shutil.copytree(ROOT / name, root / name, ignore=no_caches)
            else:
                shutil.copy(ROOT / name, root)
        if bug is not None:
            plant(bug, root)
        return run_tests(root, tests)


def why_not_caught(test: str, outcomes: dict[str, str]) -> str | None:
    """Why a test does not catch a bug. None if one of its cases fails by an assertion, and none of
    them in another way."""
    cases = {how for name, how in outcomes.items() if name == test or name.startswith(f"{test}[")}
    if not cases:
        return "does not run"
    if crashes := sorted(cases - {"passed", "assertion"}):
        return f"crashes with {', '.join(crashes)}"
    return None if "assertion" in cases else "passes"
