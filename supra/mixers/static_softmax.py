"""The key-value cache of `softmax` in tensors of a fixed size, for compiled decoding.

A compiled step needs the same shapes for every token. So there is room for S keys and values from
the start, and places that are not taken yet are masked. With a sliding window of W tokens, S is at
most W, and a new token overwrites the oldest.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from supra.errors import UserError
from supra.mixers.inputs import MixerInputs
from supra.mixers.padding import pick


class StaticSoftmaxState(NamedTuple):
    key: Tensor  # [B, S, Hkv, K], rotated
    value: Tensor  # [B, S, Hkv, V]
    valid: Tensor  # bool [B, S], False where padded or empty
    count: Tensor  # int64 [B]: places taken so far. Place i is count % S when it is written


def fixed(
    key: Tensor, value: Tensor, valid: Tensor, places: int, window: int | None
) -> StaticSoftmaxState:
    """Tensors [B, T, …] of a growing cache in `places` places, or in those of the window.

    Raises UserError if they do not fit.
    """
    places = places if window is None else min(places, window)
    filled = valid.any(0).nonzero()
    first = int(filled[0]) if len(filled) else key.shape[1]  # before it, all rows are padded
    length = key.shape[1] - first
    if length > places:
        raise _too_small(places, length)
    padded = [
        F.pad(x[:, first:], (0, 0) * (x.dim() - 2) + (0, places - length))
        for x in (key, value, valid)
    ]
    count = torch.full((len(key),), length, device=key.device)
    return StaticSoftmaxState(*padded, count)


def growing(state: StaticSoftmaxState) -> tuple[Tensor, Tensor, Tensor]:
    """Key, value and valid [B, S, …] in the order of tokens, behind empty places."""
    places = state.key.shape[1]
    order = (state.count[:, None] + torch.arange(places, device=state.key.device)) % places
    return tuple(pick(x, order) for x in state[:3])


def write(state: StaticSoftmaxState, key: Tensor, value: Tensor, inputs: MixerInputs) -> Tensor:
    """Write one token [B, 1, …] into the state. Returns which places it may look at, bool [B, S].

    A padded token leaves no trace; it may look at itself, too. Raises UserError if all places are
    taken; in a compiled graph, indexing raises instead.
    """
    places, window = state.key.shape[1], inputs.sliding_window
    rows = torch.arange(len(key), device=key.device)
    at = state.count if window is None else state.count % places
    full = window is None or places < window
    if full and not torch.compiler.is_compiling() and (state.count >= places).any():
        raise _too_small(places, places + 1)
    new = inputs.padding_mask
    new = torch.ones_like(state.valid[:, :1]) if new is None else new
    for old, token in ((state.key, key), (state.value, value), (state.valid, new)):
        old.index_put_((rows, at), token[:, 0])
    visible = state.valid | (at[:, None] == torch.arange(places, device=key.device))
    state.count.add_(new[:, 0])  # `at` may be the same tensor
    return visible


def _too_small(places: int, tokens: int) -> UserError:
    return UserError(
        f"max_cache_len (={places}) of the static cache is too small for {tokens} tokens: raise "
        "it, or leave cache_implementation out"
    )
