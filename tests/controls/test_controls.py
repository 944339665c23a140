"""The table of planted bugs is sound; `make controls` plants them all, which takes minutes."""

import ast
import subprocess
import sys
from collections import Counter

import pytest

from tests.controls.bug import ROOT, plant, why_not_caught
from tests.controls.table import BUGS

# one in torch's operations alone, one that needs a model, one in a Triton kernel
SAMPLE = ("later_before_earlier", "roll_back_does_nothing", "causal_conv_silu_gradient")


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_bug_has_its_place_and_its_tests(bug, tmp_path):
    """Its code stands once in its file and is other code, and the tests are there."""
    copy = tmp_path / bug.file
    copy.parent.mkdir(parents=True)
    source = (ROOT / bug.file).read_text(encoding="utf-8")
    copy.write_text(source, encoding="utf-8")
    plant(bug, tmp_path)
    planted = copy.read_text(encoding="utf-8")
    assert ast.dump(ast.parse(planted)) != ast.dump(ast.parse(source))
    assert bug.tests
    for test in bug.tests:
        file, _, function = test.partition("::")
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        names = {x.name for x in ast.walk(tree) if isinstance(x, ast.FunctionDef)}
        assert function.partition("[")[0] in names, test


def test_names_are_different():
    assert max(Counter(bug.name for bug in BUGS).values()) == 1


@pytest.mark.parametrize("operation", [path.parent for path in ROOT.glob("kernels/*/api.py")],
                         ids=lambda path: path.name)  # fmt: skip
def test_every_operation_has_bugs_in_torch_and_in_triton(operation):
    own = [bug for bug in BUGS if bug.name.startswith(f"{operation.name}_")]  # or in shared files
    in_triton = ["import triton\n" in (ROOT / bug.file).read_text("utf-8") for bug in own]
    assert len(own) >= 4 and set(in_triton) == {False, True}


@pytest.mark.parametrize(
    ("outcomes", "reason"),
    [
        ({"t.py::a[1]": "passed", "t.py::a[2]": "assertion"}, None),
        ({"t.py::a[1]": "assertion", "t.py::a[2]": "TypeError"}, "crashes with TypeError"),
        ({"t.py::a": "passed"}, "passes"),
        ({"t.py::ab": "assertion"}, "does not run"),
    ],
)
def test_only_an_assertion_catches_a_bug(outcomes, reason):
    assert why_not_caught("t.py::a", outcomes) == reason


def test_a_sample_is_caught():
    command = [sys.executable, "-m", "tests.controls", *SAMPLE]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "3 of 3 bugs caught" in result.stdout
