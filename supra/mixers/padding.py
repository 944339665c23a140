"""Rows with their padding put last, so that a place in the row is a place in the document."""

import torch
from torch import Tensor


def tokens_first(padding_mask: Tensor) -> Tensor:
    """The places of each row's tokens, then those of its padding: int [B, T] from bool [B, T]."""
    return padding_mask.long().argsort(dim=1, descending=True, stable=True)


def rows_and_padding(padding_mask: Tensor) -> Tensor:
    """Of rows ordered so, one after the other: the bounds of each row's tokens and of its padding,
    which is a sequence by itself. Int [2 B + 1]."""
    count = padding_mask.sum(1)
    lengths = torch.stack([count, padding_mask.shape[1] - count], dim=1).flatten()
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def pick(x: Tensor, at: Tensor) -> Tensor:
    """Tokens `at` [B, N] of each row of x [B, T, …]."""
    return x[torch.arange(x.shape[0], device=x.device)[:, None], at]
