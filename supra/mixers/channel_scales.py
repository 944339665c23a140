"""Least-squares factors per head and channel, by which calibration judges and starts a mixer."""

import torch
from torch import Tensor

from supra.mixers.inputs import MIN_POWER

# Relative to the mean square of the blocks of a head and channel. Where these are nearly alike or
# opposite, it keeps both factors small.
RIDGE = 1e-3


def channel_scales(blocks: Tensor, target: Tensor) -> Tensor:
    """The factors [Hq, P, V] by which P blocks [N, Hq, P, V], added up, come nearest to the target
    [N, Hq, V] in each channel."""
    parts = blocks.unbind(2)
    gram = torch.stack([torch.stack([(x * y).sum(0) for y in parts], -1) for x in parts], -1)
    power = gram.diagonal(dim1=-2, dim2=-1)
    if len(parts) > 1:
        power += RIDGE * power.mean(-1, keepdim=True)
    power.clamp_(min=MIN_POWER)
    products = torch.stack([(x * target).sum(0) for x in parts], -1)
    return torch.linalg.solve(gram, products).mT
