"""Time and peak memory of functions that take no arguments."""

import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

WARM_UPS = 2
MIN_SECONDS = 2e-3  # a shorter function is called repeatedly until this is reached
MAX_CALLS = 100

STATUS, CPUINFO = Path("/proc/self/status"), Path("/proc/cpuinfo")  # on Linux

Function = Callable[[], Any]


class Ratio(NamedTuple):
    """How many times as long another function takes: from the best runs, and from the median of
    pairs of runs."""

    best: float
    median: float

    @staticmethod
    def of(ours: Sequence[float], theirs: Sequence[float]) -> "Ratio":
        pairs = [b / a for a, b in zip(ours, theirs, strict=True)]
        return Ratio(min(theirs) / min(ours), statistics.median(pairs))


def interleaved(functions: Sequence[Function], repeats: int, device: str) -> list[list[float]]:
    """Seconds per call of each function, `repeats` times. Functions take turns, so that noise
    affects all of them alike."""
    calls = []
    for function in functions:
        for _ in range(WARM_UPS):
            function()
        once = seconds(function, 1, device)
        calls.append(min(MAX_CALLS, max(1, round(MIN_SECONDS / max(once, 1e-9)))))
    found = [[] for _ in functions]
    for _ in range(repeats):
        for i, function in enumerate(functions):
            found[i].append(seconds(function, calls[i], device))
    return found


def seconds(function: Function, calls: int, device: str) -> float:
    """Seconds per call, measured by the clock of the device."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / calls
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def forget_peak_memory(device: str) -> None:
    """Reset the peak to the memory that is held now, if the system supports it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif STATUS.exists():
        STATUS.with_name("clear_refs").write_text("5")  # proc(5)


def peak_memory(device: str) -> int:
    """The maximum number of bytes that this process has held, on the GPU if it is used."""
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    if STATUS.exists():  # on Linux, getrusage's peak includes the process before exec
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", STATUS.read_text())[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def processor(device: str) -> str:
    """The name of the GPU, or of the CPU with the number of torch's threads."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    name = "CPU"
    if CPUINFO.exists():
        found = re.search(r"model name\s*: (.*)", CPUINFO.read_text())
        name = found[1] if found else name
    return f"{name}, {torch.get_num_threads()} threads"
