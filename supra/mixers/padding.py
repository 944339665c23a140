"""Moving padding to the end of its row, so that tokens are where they are in their document."""

import torch
from torch import Tensor


def tokens_first(padding_mask: Tensor) -> Tensor:
    """Indices of each row's tokens, then those of its padding: int [B, T] from bool [B, T]."""
    return padding_mask.long().argsort(dim=1, descending=True, stable=True)


def rows_and_padding(padding_mask: Tensor) -> Tensor:
    """Bounds of each row's tokens and of its padding, in the flattened rows [B·T] with padding
    last: int [2 B + 1]. The padding of a row is a sequence of its own."""
    count = padding_mask.sum(1)
    lengths = torch.stack([count, padding_mask.shape[1] - count], dim=1).flatten()
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def pick(x: Tensor, at: Tensor) -> Tensor:
    """The tokens at indices `at` [B, N] of each row of x [B, T, …]."""
    return x[torch.arange(x.shape[0], device=x.device)[:, None], at]
