"""Softmax attention, which all the recurrences replace."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from supra.bench.rivals.contender import Contender, Setting


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, **_: Tensor) -> Tensor:
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def softmax_attention_step(setting: Setting) -> Callable[[], Any]:
    """One query against a cache of all keys and values, without the cost of extending the cache."""
    query = setting.token().tokens().transpose(1, 2)
    shape = (setting.batch, setting.heads, setting.length, setting.head_size)
    key, value = setting.normal(*shape), setting.normal(*shape)
    return lambda: F.scaled_dot_product_attention(query, key, value)


SOFTMAX = Contender(softmax_attention, softmax_attention_step)
