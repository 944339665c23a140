"""`supra bench gpu`: a rehearsal of a few rows, resuming, and the page."""

import json
import os
import pickle
import re
import time
import zipfile

import pytest
import torch

from supra.bench.gpu import checks, packages, report
from supra.bench.gpu.page import page
from supra.bench.gpu.results import Results
from supra.bench.gpu.rows import GROUPS, ON_A_GPU, REHEARSAL, Row
from supra.bench.limited import Failed, OutOfTime
from supra.bench.rivals import OPERATIONS
from supra.cli import main
from supra.errors import UserError

MACHINE = {"machine": "a GPU", "rehearsal": False, "torch": "2.0"}
CHECK = {"error": 1e-6, "worst": "output", "allowed": 1e-5, "against": "float64", "right": True}
SHAPE = ("operations", "kda", "forward", "2,048", "64")


class FewRows:
    """A plan of these rows."""

    def __init__(self, *rows):
        self.given = [Row(*row) for row in rows]

    def rows(self, folder):
        return self.given


class Here:
    """A worker in this process; a function may be an exception to raise."""

    calls = 0

    def __init__(self, *_):
        pass

    def call(self, function, arguments, seconds):
        if function is report.machine:
            return MACHINE
        Here.calls += 1
        if isinstance(function, Exception):
            raise function
        return function(*arguments)

    def close(self):
        pass


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """report() of given rows in this process; returns how many it measured."""
    monkeypatch.setattr(report, "Worker", Here)

    def measure(*rows, **options):
        monkeypatch.setattr(report, "REHEARSAL", FewRows(*rows))
        before = Here.calls
        report.report(folder=tmp_path, rehearse=True, **options)
        return Here.calls - before

    return measure


def test_a_rehearsal_with_a_hang_and_a_crash(tmp_path, monkeypatch, capsys):
    """Real rows in the interpreter, and every trouble costs one row."""
    wanted = ("causal_conv, decoding", "causal_conv, decode step, 9, 16")
    rows = [x for x in REHEARSAL.rows(tmp_path) if any(w in ", ".join(x.key) for w in wanted)]
    rows += [Row(("checks", "kda", "hangs"), time.sleep, (1000,))]
    rows += [Row(("checks", "kda", "crashes"), os.abort, ())]
    monkeypatch.setattr(report, "REHEARSAL", FewRows(*rows))
    command = ["bench", "gpu", "--rehearse", "--folder", str(tmp_path / "run"), "--limit", "300"]
    monkeypatch.setattr(report.Worker, "call", shorter(report.Worker.call))
    main(command)
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r"checks, causal_conv, decoding steps: right, output of step \d", lines[0])
    assert re.match(r"steps, causal_conv, decode step, 9, 16, supra: [\d.]+ ms", lines[1])
    assert ", fla: fla is not installed" in lines[2]
    assert lines[-3].startswith("checks, kda, hangs: FAILED: took more than 0.5 s")
    assert lines[-2].startswith("checks, kda, crashes: FAILED: the process ended with SIGABRT")
    assert lines[-1].startswith(f"{len(rows)} of {len(rows)} rows, 2 failed, 0 wrong")
    text = (tmp_path / "run" / "gpu.md").read_text()
    assert "**A rehearsal on a CPU" in text and "- kda, hangs: took more than 0.5 s" in text
    main(command)
    (line,) = capsys.readouterr().out.splitlines()
    assert line == lines[-1]


def shorter(call):
    """A worker's call that waits half a second for what sleeps."""
    return lambda self, function, arguments, seconds: call(
        self, function, arguments, 0.5 if function is time.sleep else seconds
    )


def test_rows_that_are_done_are_skipped(measure, tmp_path, capsys):
    first = (("checks", "kda", "a"), dict, (CHECK,))
    second = (("checks", "kda", "b"), Failed("SIGSEGV"), ())
    assert measure(first) == 1
    assert measure(first, second) == 1
    assert measure(first, second) == 0
    assert measure(first, second, retry=True) == 1
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["values"].get("failed") for row in rows] == [None, "SIGSEGV"]
    assert all(row["values"]["seconds"] >= 0 for row in rows)
    assert "checks, kda, b: FAILED: SIGSEGV" in capsys.readouterr().out


def test_a_row_that_the_end_cuts_off_is_measured_by_the_next_call(measure, capsys):
    rows = [(("checks", "kda", x), dict, (CHECK,)) for x in "abc"]
    cut = [rows[0], (("checks", "kda", "b"), OutOfTime("took long"), ()), rows[2]]
    assert measure(*cut, minutes=1, limit=100) == 2
    assert "1 of 3 rows, 0 failed, 0 wrong" in capsys.readouterr().out
    assert measure(*rows, minutes=1e-9) == 0
    assert "the same command continues" in capsys.readouterr().out
    assert measure(*rows, only="kda, c") == 1
    assert measure(*rows, groups=["decoding"]) == 0
    assert measure(*rows) == 1


def test_rows_of_two_machines_do_not_mix(measure, monkeypatch):
    row = (("checks", "kda", "a"), dict, (CHECK,))
    measure(row)
    monkeypatch.setitem(MACHINE, "torch", "3.0")
    with pytest.raises(UserError, match="has rows of another torch: name another --folder"):
        measure(row)


def test_the_page():
    ours = {"batch": 16, "ms": 1.0}
    found = {
        ("checks", "kda", "odd, float32"): CHECK | {"right": False, "error": "not finite"},
        ("checks", "kda", "as fla"): {"failed": "took more than 150 s"},
        ("compile", "kda", "64"): {"configurations": 150, "processes": 16, "seconds": 20.4},
        (*SHAPE, "supra"): ours,
        (*SHAPE, "fla"): ours | {"its_ms": 2.5, "ratio": 2.5},
        (*SHAPE, "mamba-ssm"): {"missing": "mamba_ssm is not installed"},
        ("training", "mamba2", "tune"): {
            "tokens_per_second": 123456.7, "step_ms": 132.0, "gflops_per_token": 1.25, "mfu": 0.256,
            "peak_gb": 10.0,
        },
        ("decoding", "1 × 2,048", "teacher"): {
            "ms": 4.0, "tokens_per_second": 250.0, "state_mb": 94.4, "peak_gb": 1.5,
        },
    }  # fmt: skip
    planned = [Row(key, dict, ()) for key in (*found, ("training", "mamba2", "align"))]
    text = page(MACHINE, planned, found)
    lines = [re.sub(" +", " ", line) for line in text.splitlines()]
    assert "rehearsal" not in text.lower() and "- machine: a GPU" in lines
    assert "| kda | odd, float32 | float64 | not finite | 1.0e-05 | output | **wrong** |" in lines
    assert "| kda | 64 | 150 | 16 | 20 |" in lines
    assert "- kda, as fla: took more than 150 s" in lines
    assert "| kda | forward | 2,048 | 64 | 16 | 1.000 | 2.500, 2.50× | — |" in lines
    assert "- mamba_ssm is not installed" in lines
    assert "| mamba2 | tune | 123,457 | 132.0 | 1.25 | 25.6 % | 10.0 |" in lines
    assert "1 of 2 rows are not measured yet." in lines
    assert "| 1 × 2,048 | teacher | 4.00 | 250 | 94.4 | 1.5 |" in lines


@pytest.mark.parametrize("plan", [ON_A_GPU, REHEARSAL], ids=["gpu", "rehearsal"])
def test_every_operation_is_in_the_plan(plan, tmp_path):
    rows = list(plan.rows(tmp_path))
    keys = [row.key for row in rows]
    assert len(set(keys)) == len(keys)
    assert list(dict.fromkeys(row.group for row in rows)) == list(GROUPS)
    for group in ("checks", "operations", "steps"):
        assert {key[1] for key in keys if key[0] == group} == set(OPERATIONS)
    assert {key[-1] for key in keys if key[0] == "operations"} >= {"fla", "causal-conv1d"}
    assert all(pickle.loads(pickle.dumps(row)).key == row.key for row in rows)


def test_an_error_is_relative_and_seen():
    exact = torch.tensor([3.0, 4.0])
    assert checks.relative_error(exact + torch.tensor([0.0, 0.5]), exact) == pytest.approx(0.1)
    judged = checks._judged({"output": 0.1, "gradient of key": float("nan")}, 0.2, "float64")
    assert not judged["right"] and judged["worst"] == "gradient of key"
    assert not checks._judged({"output": 0.3}, 0.2, "float64")["right"]


def test_wheels_are_unpacked_once(tmp_path):
    wheels, folder = tmp_path / "wheels", tmp_path / "run" / "rivals"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "rival-1.0-py3-none-any.whl", "w") as file:
        file.writestr("rival/__init__.py", "fast = True")
    for _ in range(2):
        places = packages.unpack(wheels, folder)
    assert places == [wheels, folder / "rival-1.0-py3-none-any"]
    assert (places[1] / "rival" / "__init__.py").read_text() == "fast = True"
    (wheels / "damaged.whl").write_text("")
    with pytest.raises(UserError, match=r"damaged\.whl is damaged"):
        packages.unpack(wheels, folder)


@pytest.mark.parametrize("text", ["{}", "[]", "no JSON"])
def test_another_file_is_refused(tmp_path, text):
    file = tmp_path / "results.json"
    file.write_text(text)
    with pytest.raises(UserError, match=r"results\.json"):
        Results(file)


def test_no_gpu_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(report.torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="torch finds no GPU: --rehearse"):
        report.report(folder=tmp_path)
