"""Plant every bug in turn and print which tests catch it.

Exits with 1 if a test does not catch its bug by an assertion, or if a test fails without a bug.
"""

import argparse
import multiprocessing
import sys

from tests.controls.bug import Bug, not_caught, outcomes_of
from tests.controls.runner import import_slow_modules
from tests.controls.table import BUGS

HEAD = "| planted bug | what it does | caught by |\n| --- | --- | --- |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.controls", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="bugs to plant; default: all")
    parser.add_argument("--jobs", type=int, default=2, help="bugs at a time; default 2")
    options = parser.parse_args()
    known = {bug.name: bug for bug in BUGS}
    if unknown := sorted(set(options.names) - known.keys()):
        parser.error(f"no bug is called {unknown[0]}; the names are {', '.join(known)}")
    bugs = [known[name] for name in options.names] or BUGS
    import_slow_modules()
    print(HEAD, flush=True)
    with multiprocessing.get_context("fork").Pool(options.jobs) as pool:
        failing = pool.apply_async(failing_without_a_bug, [bugs])
        missed = 0
        for bug, lines in zip(bugs, pool.imap(not_caught, bugs), strict=True):
            missed += bool(lines)
            verdict = "<br>".join(f"**not caught**: {line}" for line in lines)
            verdict = verdict or "<br>".join(bug.tests)
            print(f"| `{bug.name}` | {bug.sentence} | {verdict} |", flush=True)
        lines = failing.get()
    print("", *lines, f"{len(bugs) - missed} of {len(bugs)} bugs caught", sep="\n")
    sys.exit(1 if missed or lines else 0)


def failing_without_a_bug(bugs: list[Bug]) -> list[str]:
    """The tests of these bugs that do not pass in a copy of the source, one line each."""
    outcomes = outcomes_of(sorted({test for bug in bugs for test in bug.tests}))
    return [f"{name} without a bug: {how}" for name, how in outcomes.items() if how != "passed"]


if __name__ == "__main__":
    main()
