"""Sign pairs: [x, −x] in the place of x, where a nonlinearity would lose one of the signs.

SiLU(x) − SiLU(−x) = x, so a sum over both blocks with factors 1 and −1 is linear in x.
"""

import torch
from torch import Tensor

Signs = tuple[int, ...]  # of the blocks of channels that a head has

ONE_SIGN: Signs = (1,)
SIGN_PAIR: Signs = (1, -1)


def signed(x: Tensor, signs: Signs) -> Tensor:
    """x [..., C] once for each sign: [..., P · C] for P signs."""
    return torch.cat([x if sign > 0 else -x for sign in signs], dim=-1)
