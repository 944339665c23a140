"""`supra bench compile --against fla`: what is recorded, which configuration counts, the tables."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from supra.bench import against
from supra.bench.compiled import Compiled, Job
from supra.bench.fla_kernels import Theirs, Work, compile_theirs, spread
from supra.bench.workers import environment, run_parallel
from supra.cli import main
from supra.errors import UserError

JOB = Job("kda", "fla", 64, "sm_90")
OURS = Compiled(JOB, "forward", "ours", 100, 0, 2048, 4, 5, tensor_core={"HMMA": 8}, narrow=1)
THEIRS = replace(OURS, kernel="theirs", registers=255, shared=4096, blocks=2, wide=0.5, narrow=3)
BOTH = against.Both("kda", "forward", 64, "sm_90", [OURS, OURS], [Theirs(THEIRS, "BK: 32", 3, 48)])


def test_the_best_of_some_configurations(tmp_path):
    """128 × 128 spills in two warps, so the last configuration counts."""
    with environment({"TRITON_INTERPRET": None, "TRITON_CACHE_DIR": str(tmp_path)}):
        script = Path(__file__).parent / "tuned_kernels.py"
        command = [sys.executable, script]
        run = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert run.returncode == 0, run.stderr
    tuned, fixed = json.loads(run.stdout)
    assert (tuned["compiled"], tuned["listed"]) == (2, 4)
    assert "SIZE: 64" in tuned["configuration"] and tuned["row"]["kernel"] == "tuned"
    assert tuned["row"]["stack"] == 0 and list(tuned["row"]["tensor_core"]) == ["HMMA"]
    assert (fixed["compiled"], fixed["listed"], fixed["configuration"]) == (1, 1, "fixed")


def test_configurations_are_spread():
    assert spread([1, 2, 3], 5) == [1, 2, 3]
    assert spread(list(range(48)), 3) == [0, 24, 47]
    assert spread([1, 2, 3], 1) == [1]


def test_the_tables(monkeypatch):
    monkeypatch.setattr(against, "version", lambda name: "9.9")
    lines = [re.sub(" +", " ", x) for x in against.lines([BOTH], " --ops kda", 3)]
    assert lines[2].startswith("Made by `supra bench compile --against fla --ops kda`")
    row = "| forward | 64 | sm_90 | 2 / 1 | 100 / 255 | 0 / 0 | 2.0 / 4.0 | 5 / 2 | 16 / 8 | "
    assert row + "100% / 50% | 2 / 3 |" in lines
    assert any(x.startswith("| fla |") and x.endswith("BK: 32 (best of 3 of 48) |") for x in lines)
    broken = replace(BOTH, ours=[replace(OURS, error="CompilationError: no")])
    lines = against.lines([broken], "", 3)
    assert any("CompilationError: no" in x for x in lines)


def test_it_fails_where_only_supra_spills():
    spills = replace(OURS, stack=8)
    assert BOTH.failure() is None
    assert "forward ours, head size 64, sm_90: spills" in replace(BOTH, ours=[spills]).failure()
    theirs = [Theirs(replace(THEIRS, stack=8), "", 1, 1)]
    assert replace(BOTH, ours=[spills], theirs=theirs).failure() is None


def test_the_command(monkeypatch, capsys):
    monkeypatch.setattr(against, "find_spec", lambda name: True)
    monkeypatch.setattr(
        against, "_measure", lambda *_: [replace(BOTH, ours=[replace(OURS, stack=8)])]
    )
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "compile", "--against", "fla", "--json", "--check"])
    printed = capsys.readouterr()
    assert stopped.value.code == 1 and "theirs does not" in printed.err
    (row,) = json.loads(printed.out)
    assert row["theirs"][0]["row"]["registers"] == 255


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"operations": ["long_conv"]}, "unknown operation 'long_conv'"),
        ({"targets": ["small"]}, "unknown target 'small'"),
        ({"widths": [8]}, r"--head-sizes \(=8\) must be from 16 to 256"),
        ({"processes": 0}, "--jobs"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(UserError, match=message):
        against.report("fla", **options)


def test_the_package_is_needed(monkeypatch):
    monkeypatch.setattr(against, "find_spec", lambda name: name != "fla" or None)
    with pytest.raises(UserError, match="fla is not installed: pip install"):
        against.report("fla")


@pytest.mark.skipif(not find_spec("fla"), reason="flash-linear-attention is not installed")
def test_kernels_of_the_package_compile(tmp_path):
    changes = {"TRITON_INTERPRET": None, "TRITON_CACHE_DIR": str(tmp_path)}
    work = Work("mamba2", 64, "sm_90", 1)
    (found,) = run_parallel(compile_theirs, [work], 1, changes, "")
    assert {x.row.part for x in found} == {"forward", "backward"}
    assert all(x.row.registers and not x.row.error for x in found)
