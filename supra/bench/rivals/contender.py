"""What takes part in a race: an operation, supra's way to compute it, and its rivals."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

Inputs = dict[str, Tensor]


class Setting(NamedTuple):
    """The shape of the inputs (B, T, H, head size), their dtype, and the device."""

    batch: int
    length: int
    heads: int
    head_size: int
    dtype: torch.dtype
    device: str

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=self.dtype, device=self.device)

    def tokens(self) -> Tensor:
        """[B, T, H, head_size]"""
        return self.normal(self.batch, self.length, self.heads, self.head_size)

    def factors(self) -> Tensor:
        """[B, T, H] float32 in [0, 1), like the decays and step sizes of models."""
        return torch.rand(self.batch, self.length, self.heads, device=self.device)

    def state(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[B, H, head_size, head_size]"""
        shape = (self.batch, self.heads, self.head_size, self.head_size)
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def token(self) -> "Setting":
        """The setting for one token of the same batch."""
        return self._replace(length=1)


@dataclass(frozen=True)
class Contender:
    """One way to compute an operation.

    whole(**inputs): the output for whole sequences.
    step(setting): a function that decodes one token after setting.length other tokens.
    """

    whole: Callable[..., Tensor] | None
    step: Callable[[Setting], Callable[[], Any]] | None = None
    package: str = "torch"
    gpu_only: bool = False

    def hindrance(self, device: str) -> str | None:
        """Why it cannot run on that device."""
        if find_spec(self.package) is None:
            return f"{self.package} is not installed"
        if self.gpu_only and device != "cuda":
            return f"{self.package} needs a GPU"
        return None

    def runs(self, device: str) -> bool:
        return self.hindrance(device) is None


@dataclass(frozen=True)
class Operation:
    """inputs(setting) makes random inputs; ours(backend) is supra's way to compute the
    operation."""

    inputs: Callable[[Setting], Inputs]
    ours: Callable[[str], Contender]
    rivals: dict[str, Contender] = field(default_factory=dict)


def on_gpu(
    package: str,
    whole: Callable[..., Tensor],
    step: Callable[[Setting], Callable[[], Any]] | None = None,
) -> Contender:
    """Functions of a package whose kernels need a GPU."""
    return Contender(whole, step, package, gpu_only=True)


fla = partial(on_gpu, "fla")  # flash-linear-attention
