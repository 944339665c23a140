"""The machine of a run, which the rows of one file share."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from supra.bench import timing

PACKAGES = (
    "torch", "triton", "transformers", "flash-linear-attention", "fla-core", "causal-conv1d",
    "mamba-ssm",
)  # fmt: skip


def machine(rehearsal: bool) -> dict[str, Any]:
    """The names of the GPU, or of the CPU, and the versions of packages."""
    device = "cpu" if rehearsal else "cuda"
    packages = {package: _version(package) for package in PACKAGES}
    return {"machine": timing.processor(device), "rehearsal": rehearsal} | packages


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
