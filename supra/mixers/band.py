"""Exact attention within a band: every token and the W − 1 before it, in blocks.

Keys and values include the W tokens before this call, [B, W + T, H, D]. A block of C tokens looks
at the C + W − 1 tokens that any of them may see. Entry j of token c in its block lies
c + W − 1 − j tokens back.
"""

import torch
from torch import Tensor

BLOCK = 64  # tokens; a window of 64 then computes twice as many scores as it needs


def band_distance(tokens: int, size: int, device: torch.device) -> Tensor:
    """How many tokens back each entry lies: int [T, J]. The band is 0 to size - 1."""
    block = min(BLOCK, tokens)
    at = torch.arange(tokens, device=device)[:, None] % block
    return at + size - 1 - torch.arange(block + size - 1, device=device)


def band_scores(query: Tensor, key: Tensor, size: int) -> Tensor:
    """q·k of each entry: [B, T, Hq, K] and [B, W + T, Hkv, K] to [B, T, Hq, J]."""
    tokens, heads = query.shape[1], key.shape[2]
    query = _blocks(query, min(BLOCK, tokens)).unflatten(3, (heads, -1))
    scores = torch.einsum("bnchgk,bnhkj->bnchgj", query, _bands(key, tokens, size))
    return scores.flatten(3, 4).flatten(1, 2)[:, :tokens]


def band_sums(shares: Tensor, value: Tensor, size: int) -> Tensor:
    """Σ share·v over the entries: [B, T, Hq, J] and [B, W + T, Hkv, V] to [B, T, Hq, V]."""
    tokens, heads = shares.shape[1], value.shape[2]
    shares = _blocks(shares, min(BLOCK, tokens)).unflatten(3, (heads, -1))
    sums = torch.einsum("bnchgj,bnhvj->bnchgv", shares, _bands(value, tokens, size))
    return sums.flatten(3, 4).flatten(1, 2)[:, :tokens]


def _blocks(x: Tensor, block: int) -> Tensor:
    """[B, T, …] to [B, N, C, …], with zeros after the last token."""
    return _padded(x, -x.shape[1] % block).unflatten(1, (-1, block))


def _bands(x: Tensor, tokens: int, size: int) -> Tensor:
    """[B, W + T, H, D] to [B, N, H, D, J]: the tokens that each block may see."""
    block = min(BLOCK, tokens)
    return _padded(x, -tokens % block)[:, 1:].unfold(1, block + size - 1, block)


def _padded(x: Tensor, tokens: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, 0) * (x.dim() - 2) + (0, tokens))
