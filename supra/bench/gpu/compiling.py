"""Compiles flash-linear-attention's kernels on all cores.

Its autotuner would compile up to 300 configurations of an operation, one after the other: half an
hour for all operations. After this it only times them.
"""

import os
from functools import partial
from typing import Any

import torch

from supra.bench.fla_kernels import fill_cache
from supra.bench.rivals import OPERATIONS, Setting
from supra.bench.workers import run_parallel

TARGETS = {8: "sm_80", 9: "sm_90", 10: "sm_100"}  # by the first number of the compute capability


def compile_all(operation: str, setting: Setting) -> dict[str, Any]:
    """Fill Triton's cache with the kernels of both passes."""
    if missing := OPERATIONS[operation].rivals["fla"].hindrance(setting.device):
        return {"missing": missing}
    major, _ = torch.cuda.get_device_capability()
    if major not in TARGETS:
        return {"missing": f"compute capability {major} is not known"}
    parts = os.cpu_count() or 1
    fill = partial(fill_cache, operation, setting, TARGETS[major], parts=parts)
    done = run_parallel(fill, list(range(parts)), parts, {}, "compiling")
    return {"configurations": sum(done), "processes": parts}
