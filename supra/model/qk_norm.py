"""QK-norm in front of a mixer that normalises queries and keys itself.

Architectures whose recurrent layers have no QK-norm could not hold the model otherwise. The norm
leaves out its division and still multiplies by its weight, which folds into the projection before
it. So no tensor is lost, and the teacher inside the model gets its norm back.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

NAMES = ("q_norm", "k_norm")  # in all families that have an RMSNorm there


class _WeightAlone:
    """Mixed into the class of an RMSNorm."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] times what the norm makes of ones, which is its weight."""
        return x * super().forward(torch.ones_like(x[(0,) * (x.dim() - 1)]))

    def __reduce__(self):  # the class is made at run time, so pickles name its base class
        return _bare_norm, (type(self).__mro__[2],), self.__dict__


def _bare_norm(base: type[nn.Module]) -> nn.Module:
    norm = base.__new__(base)
    norm.__class__ = _without_division(base)
    return norm


def _without_division(base: type[nn.Module]) -> type[nn.Module]:
    return type(f"{base.__name__}Weight", (_WeightAlone, base), {"__module__": __name__})


def qk_norms(attention: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The RMSNorms of queries and keys in an attention module, with their names."""
    for name in NAMES:
        norm = getattr(attention, name, None)
        if norm is not None and "RMSNorm" in type(norm).__name__:
            yield name, norm


def drop_division(attention: nn.Module) -> None:
    """Let the QK-norm of an attention module multiply by its weight alone, in place."""
    for _, norm in qk_norms(attention):
        norm.__class__ = _without_division(type(norm))


def restore_division(attention: nn.Module) -> None:
    """Undo `drop_division`; nothing if it was not done."""
    for _, norm in qk_norms(attention):
        if isinstance(norm, _WeightAlone):
            norm.__class__ = type(norm).__mro__[2]
