"""Runs the rows of `supra bench gpu`, prints each, and keeps JSON and page up to date."""

import math
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from supra.bench.gpu.machine import machine
from supra.bench.gpu.packages import unpack
from supra.bench.gpu.page import line, page
from supra.bench.gpu.results import FAILED, SECONDS, Results
from supra.bench.gpu.rows import GROUPS, ON_A_GPU, REHEARSAL, Row
from supra.bench.limited import Failed, OutOfTime, Worker
from supra.errors import UserError, check_choice

MEASURED, REHEARSED = Path("runs/gpu"), Path("runs/gpu-rehearsal")
LIMIT, REHEARSAL_LIMIT = 150.0, 900.0  # seconds for a row; the interpreter takes long
START = 300.0  # seconds for a process to start and to name the machine


def report(
    *,
    folder: Path | None = None,
    out: Path | None = None,
    groups: Sequence[str] = (),
    only: str = "",
    rivals: Path | None = None,
    minutes: float | None = None,
    limit: float | None = None,
    retry: bool = False,
    rehearse: bool = False,
) -> None:
    """Measure the rows that are not done yet, print each, and write the page `out`.

    Args:
        folder: for results.json, models, what the rows print, and the page unless `out` is given.
        groups: of rows; all if none are given.
        only: a text that the name of a row must contain.
        rivals: a folder with wheels of rivals.
        minutes: stop before so much time has passed; None for no end.
        limit: seconds for a row; None for LIMIT, or REHEARSAL_LIMIT.
        retry: also measure the rows again that failed, or whose rival was missing.
        rehearse: tiny shapes in Triton's interpreter on the CPU.

    Raises UserError without a GPU, unless rehearsing.
    """
    deadline = time.monotonic() + (math.inf if minutes is None else 60 * minutes)
    _check(groups, minutes, limit)
    if limit is None:
        limit = REHEARSAL_LIMIT if rehearse else LIMIT
    folder = folder or (REHEARSED if rehearse else MEASURED)
    out = out or folder / "gpu.md"
    if not rehearse and not torch.cuda.is_available():
        raise UserError("torch finds no GPU: --rehearse runs every row on the CPU with tiny shapes")
    folder.mkdir(parents=True, exist_ok=True)
    results = Results(folder / "results.json")
    if retry:
        results.forget_failed()
    rows = list((REHEARSAL if rehearse else ON_A_GPU).rows(folder.resolve()))
    chosen = [x for x in rows if (not groups or x.group in groups) and only in ", ".join(x.key)]
    worker = Worker(folder / "log.txt", _environment(folder, rivals, rehearse))
    try:
        results.measured_on(worker.call(machine, (rehearse,), START))
        for row in chosen:
            if row.key not in results.rows and not _measure(worker, results, row, limit, deadline):
                break
            out.write_text(page(results.machine, rows, results.rows))
    finally:
        worker.close()
    print(_summary(results, chosen, out), flush=True)


def _check(groups: Sequence[str], minutes: float | None, limit: float | None) -> None:
    """Raise UserError for an unknown name or a number out of range."""
    for group in groups:
        check_choice("groups", group, GROUPS)
    for name, value in (("minutes", minutes), ("limit", limit)):
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name} (={value}) must be a number above 0")


def _measure(worker: Worker, results: Results, row: Row, limit: float, deadline: float) -> bool:
    """Measure and print one row. False, and no row, if the time of the whole run is over."""
    left, started = deadline - time.monotonic(), time.monotonic()
    if left <= 0:
        return False
    try:
        values = worker.call(row.function, row.arguments, min(limit, left))
    except Failed as failure:
        if isinstance(failure, OutOfTime) and left < limit:
            return False
        values = {FAILED: str(failure)}
    values = values | {SECONDS: time.monotonic() - started}
    results.add(row.key, values)
    print(line(row.key, values), flush=True)
    return True


def _summary(results: Results, chosen: Sequence[Row], out: Path) -> str:
    keys = [row.key for row in chosen]
    failed = sum(FAILED in results.rows.get(key, {}) for key in keys)
    wrong = sum(results.rows.get(key, {}).get("right") is False for key in keys)
    done = sum(key in results.rows for key in keys)
    rest = "" if done == len(keys) else "; the same command continues"
    return f"{done} of {len(keys)} rows, {failed} failed, {wrong} wrong: {out}{rest}"


def _environment(folder: Path, rivals: Path | None, rehearse: bool) -> dict[str, str | None]:
    found = {"TRITON_INTERPRET": "1" if rehearse else None, "HF_HUB_OFFLINE": "1"}
    if rehearse:
        found["CUDA_VISIBLE_DEVICES"] = ""
    if rivals is not None:
        places = unpack(rivals, folder / "rivals")
        before = [x for x in (os.environ.get("PYTHONPATH"),) if x]
        found["PYTHONPATH"] = os.pathsep.join([*map(str, places), *before])
    return found
