"""The speed of one operation, alone or beside one rival."""

from typing import Any

import torch

from supra.bench.kernels import race
from supra.bench.rivals import OPERATIONS, Setting

SAME = ("fla", "causal-conv1d", "mamba-ssm")  # rivals that compute the same function


def setting(device: str, tokens: int, length: int, heads: int, head_size: int) -> Setting:
    """As many rows as make up `tokens`, at least one."""
    return Setting(max(1, tokens // length), length, heads, head_size, torch.bfloat16, device)


def measure(
    operation: str, direction: str, rival: str | None, setting: Setting, repeats: int
) -> dict[str, Any]:
    """Median milliseconds of both, and the median of the ratios of pairs of runs."""
    if rival and (missing := OPERATIONS[operation].rivals[rival].hindrance(setting.device)):
        return {"missing": missing}
    rivals = [rival] if rival else []
    (found,) = race(operation, direction, "triton", setting, repeats, rivals)
    values = {"batch": setting.batch, "ms": found.milliseconds}
    if rival:
        values |= {"its_ms": found.rival_milliseconds, "ratio": found.median_ratio}
    return values
