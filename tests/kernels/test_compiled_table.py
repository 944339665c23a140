"""kernels/COMPILED.md says what the installed Triton makes of the kernels, and every gate holds."""

import os
import re
import subprocess
import sys
import warnings
from collections import defaultdict
from pathlib import Path

import pytest
import triton

TABLE = Path(__file__).parents[2] / "kernels" / "COMPILED.md"
MADE_WITH = re.compile(r"with Triton (\S+);")
OPTIONS = re.compile(r"`supra bench compile(.*) --out")
NAMES = ("kernel", "pass", "case", "head size", "target")


def read_rows(text):
    """Rows of all tables as dicts, with the operation they are of."""
    operation, header = "", []
    for line in text.splitlines():
        if line.startswith("## "):
            operation, header = line[3:], []
        elif line.startswith("| "):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if not header or cells[0] in ("kernel", "pass"):
                header = cells
            elif set(cells[0]) != {"-"}:
                yield {"operation": operation} | dict(zip(header, cells, strict=True))


def by_name(rows):
    """A kernel that one pass launches in several ways has several rows."""
    found = defaultdict(list)
    for row in rows:
        targets = row.pop("targets", None)  # those that were asked for
        name = tuple(row.get(name, targets and "traffic") for name in ("operation", *NAMES))
        found[name].append(sorted(row.items()))
    return {name: sorted(rows) for name, rows in found.items()}


def compile_again(tmp_path, *options):
    out = tmp_path / "COMPILED.md"
    command = [sys.executable, "-m", "supra", "bench", "compile", "--out", out, *options]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return out.read_text()


def compare(again):
    written = TABLE.read_text()
    version = MADE_WITH.search(written)[1]
    if version != triton.__version__:
        warnings.warn(
            f"the table is of Triton {version}, not {triton.__version__}: only gates are compared",
            stacklevel=1,
        )
        return
    rows, again = by_name(read_rows(written)), by_name(read_rows(again))
    assert again
    missing = [row for name in again for row in again[name] if row not in rows.get(name, [])]
    assert missing == []


def test_gates_hold_in_the_table():
    kernels = [row for row in read_rows(TABLE.read_text()) if "kernel" in row]
    assert len(kernels) > 50
    assert [row for row in kernels if row["gates"] != "ok"] == []


def test_a_part_of_the_table_is_up_to_date(tmp_path):
    options = "--ops causal_conv --archs sm_90 --head-sizes 64 --jobs 1 --check --case plain"
    compare(compile_again(tmp_path, *options.split()))


@pytest.mark.long
def test_the_table_is_up_to_date(tmp_path):
    options = OPTIONS.search(TABLE.read_text())[1].split()
    compare(compile_again(tmp_path, *options, "--check"))
