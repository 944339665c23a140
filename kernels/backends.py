"""Which backend runs, by one rule for all operations.

"auto" is triton for 16-bit and float32 tensors on a GPU when triton is installed (on AMD's GPUs for
bfloat16 only), and torch for all else. A backend that is asked for by name runs or raises; none
falls back to another.
"""

import logging
import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from supra.kernels.checks import unknown

BACKENDS = ("auto", "torch", "triton", "reference")

HAS_TRITON = find_spec("triton") is not None

logger = logging.getLogger("supra.kernels")


def choose(operation: str, backend: str, *tensors: Tensor, limit: str | None = None) -> str:
    """The backend that runs; ValueError when `backend` cannot run on these tensors.

    limit: why the operation's Triton kernels do not take them, if they do not.
    """
    if backend not in BACKENDS:
        raise ValueError(unknown("backend", backend, BACKENDS))
    if backend == "triton" and (reason := _hindrance(tensors) or limit):
        raise ValueError(f"backend (='triton') cannot run {operation}: {reason}")
    if backend == "auto":
        device = tensors[0].device.type
        backend = "triton" if device == "cuda" and not (_hindrance(tensors) or limit) else "torch"
        if torch.compiler.is_exporting():  # the program may run on another device
            backend = "torch"
        if not torch.compiler.is_compiling():
            _announce(operation, device, backend)
    return backend


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors; triton reads this too."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def without_autocast(device: torch.device) -> AbstractContextManager:
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def _hindrance(tensors: tuple[Tensor, ...]) -> str | None:
    """Why Triton cannot run on these tensors."""
    device = tensors[0].device.type
    if not HAS_TRITON:
        return "triton is not installed; install it, or use 'auto' or 'torch'"
    if device != "cuda" and not (device == "cpu" and interpreting()):
        return f"its kernels need a GPU and the tensors are on {device}; use 'auto' or 'torch'"
    if torch.version.hip and any(x.dtype != torch.bfloat16 for x in tensors):
        return "on AMD GPUs its products take bfloat16 only; convert, or use 'auto' or 'torch'"
    if any(x.dtype == torch.float64 for x in tensors):
        return "its kernels compute in float32 and an input is float64; use 'auto' or 'torch'"
    return None


@cache
def _announce(operation: str, device: str, backend: str) -> None:
    logger.info("%s on %s runs the %s backend", operation, device, backend)
