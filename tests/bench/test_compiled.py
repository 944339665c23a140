"""Reading compiled kernels, tried on small kernels whose machine code is known in advance."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from supra.bench import compile as command
from supra.bench.compiled import PROCESSORS, Compiled, Job, resident_blocks
from supra.bench.sass import Instruction
from supra.bench.traffic import Traffic
from supra.bench.workers import environment
from supra.errors import UserError

TARGETS = ("sm_80", "sm_90", "sm_100")
JOB = Job("linear_attention", "plain", 64, "small")
ROW = Compiled(JOB, "forward", "chunk_output", blocks=1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("triton"))
    with environment({"TRITON_INTERPRET": None, "TRITON_CACHE_DIR": cache}):
        script = Path(__file__).parent / "tiny_kernels.py"
        run = subprocess.run(
            [sys.executable, script, *TARGETS], capture_output=True, text=True, env=os.environ
        )
    assert run.returncode == 0, run.stderr
    rows = json.loads(run.stdout)
    return {name: Compiled(**row | {"job": Job(**row["job"])}) for name, row in rows.items()}


@pytest.mark.parametrize(
    ("target", "kind"), [("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("sm_100", "UTCHMMA")]
)
def test_product_on_tensor_cores(tiny, target, kind):
    row = tiny[f"bf16 {target}"]
    assert (row.dots, row.scalar_dots) == (1, 0)
    assert list(row.tensor_core) == [kind]
    assert row.tensor_core[kind] >= 4
    assert (row.wide, row.narrow, row.stack) == (1.0, 0, 0)
    assert 16 <= row.registers <= 255
    assert 2 * 64 * 64 * 2 <= row.shared <= 4 * 64 * 64 * 2 + 64  # two tiles, or with the result
    assert row.failures() == []


def test_exact_float32_has_no_tensor_cores(tiny):
    row = tiny["ieee sm_80"]
    assert (row.dots, row.scalar_dots, row.tensor_core) == (1, 1, {})
    assert "1 dots without tensor cores" in row.failures()


def test_spills_are_seen(tiny):
    row = tiny["spilling sm_80"]
    assert row.stack > 1000
    assert row.failures() == [f"spills {row.stack} B of stack"]


@pytest.mark.parametrize("target", TARGETS)
def test_bytes_are_those_of_the_tiles(tiny, target):
    # a vector that every thread loads an element of: 256 B against 2 * 8192 B, once a round
    row = tiny[f"vectors {target}"]
    assert row.wide == pytest.approx(2 * 8192 / (2 * 8192 + 256))
    assert row.narrow >= 1
    assert row.matrices
    assert row.failures() == []


def test_kernels_of_vectors_have_no_gate(tiny):
    row = tiny["columns sm_80"]
    assert row.wide < 0.6
    assert not row.matrices
    assert row.failures() == []


def test_what_does_not_compile_is_a_failure(tiny):
    (failure,) = tiny["broken sm_80"].failures()
    assert failure.startswith("CompilationError") or "Error" in failure


@pytest.mark.parametrize(
    ("opcode", "bits"),
    [
        ("LDG.E", 32),
        ("LDG.E.U16", 16),
        ("LDG.E.S8.CONSTANT", 8),
        ("LDG.E.64", 64),
        ("LDG.E.LTC128B", 32),  # a hint for the cache, no width
        ("LDGSTS.E.BYPASS.LTC128B.128", 128),
        ("STG.E.ENL2.256", 256),
    ],
)
def test_width_of_an_access(opcode, bits):
    assert Instruction(opcode, ("", 0)).bits == bits


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "tensor_memory", "blocks"),
    [
        ("sm_80", 128, 0, 4, 0, 4),
        ("sm_80", 168, 0, 4, 0, 3),
        ("sm_80", 169, 0, 4, 0, 2),
        ("sm_80", 255, 0, 4, 0, 2),
        ("sm_80", 255, 0, 8, 0, 1),
        ("sm_80", 16, 0, 1, 0, 32),
        ("sm_80", 32, 80 * 1024, 4, 0, 2),
        ("sm_90", 32, 80 * 1024, 4, 0, 2),
        ("sm_90", 32, 75 * 1024, 4, 0, 3),
        ("sm_100", 32, 0, 4, 256, 2),
        ("small", 32, 64 * 1024, 4, 0, 1),
        ("small", 32, 0, 4, 0, 12),
    ],
)
def test_resident_blocks(target, registers, shared, warps, tensor_memory, blocks):
    found = resident_blocks(PROCESSORS[target], registers, shared, warps, tensor_memory)
    assert found == blocks


@pytest.mark.parametrize(
    ("change", "failure"),
    [
        ({"stack": 8}, "spills 8 B of stack"),
        ({"dots": 3, "scalar_dots": 1}, "1 dots without tensor cores"),
        ({"dots": 3}, "3 dots without tensor cores"),
        ({"wide": 0.89}, "89% of bytes in 128 bits, less than 90%"),
        ({"shared": 65537}, "65537 B of shared memory, more than 65536"),
        ({"blocks": 0}, "one block does not fit on a multiprocessor"),
        ({"error": "CompilationError: no"}, "CompilationError: no"),
    ],
)
def test_gates(change, failure):
    assert ROW.failures() == []
    assert replace(ROW, **change).failures() == [failure]


def test_shared_memory_is_bounded_on_small_gpus_only():
    row = replace(ROW, job=replace(JOB, target="sm_90"), shared=200_000)
    assert row.failures() == []


def test_rows_are_markdown():
    header, rule, row = command.table(command.KERNEL_HEADER, [command.kernel_row(ROW)])
    assert len(header) == len(rule) == len(row)
    assert row.split("|")[1].strip() == "chunk_output"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"operations": ["linear_atention"]}, "did you mean 'linear_attention'"),
        ({"targets": ["sm_75"]}, "unknown target 'sm_75'"),
        ({"cases": ["fast"]}, "unknown case 'fast'"),
        ({"widths": [512]}, "must be from 1 to 256"),
        ({"processes": 0}, "--jobs"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(UserError, match=message):
        command.report(**options)


def test_check_names_the_row_that_breaks_a_gate(monkeypatch, capsys):
    monkeypatch.setattr(command, "compile_all", lambda *_: [ROW, replace(ROW, stack=8)])
    monkeypatch.setattr(command, "measure_all", lambda *_: [])
    with pytest.raises(SystemExit) as stopped:
        command.report(check=True)
    assert stopped.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "linear_attention (plain) forward chunk_output, head size 64, small: spills 8 B of stack"
    )


def test_json_has_every_row(monkeypatch, capsys):
    moved = Traffic("linear_attention", "plain", 64, "forward", minimum=8.0, distinct=16.0)
    monkeypatch.setattr(command, "compile_all", lambda *_: [replace(ROW, stack=8)])
    monkeypatch.setattr(command, "measure_all", lambda *_: [moved])
    command.report(as_json=True)
    rows = json.loads(capsys.readouterr().out)
    assert rows["kernels"][0]["failures"] == ["spills 8 B of stack"]
    assert rows["traffic"][0]["distinct"] == 16.0


def test_triton_is_needed(monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="triton"):
        command.report()
