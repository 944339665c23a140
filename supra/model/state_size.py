"""The size of what a model carries from token to token."""

import copy

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.cache_utils import Cache

from supra.checkpoint.config_rules import making_model


def state_bytes(config: PreTrainedConfig, context: int, dtype: torch.dtype | None = None) -> int:
    """Bytes of the cache of one sequence after `context` tokens, for any causal language model.

    The model runs once on the meta device, and the tensors in its cache are counted. `dtype` is
    that of the weights, by default the config's own. Key-value caches have the same dtype;
    recurrent states are always float32.
    """
    config = copy.deepcopy(config)
    with torch.device("meta"), making_model(config):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype or config.dtype, experts_implementation="batched_mm"
        ).eval()
        tokens = torch.zeros((1, context), dtype=torch.long)
        with torch.no_grad():
            cache = model(tokens, use_cache=True, logits_to_keep=1).past_key_values
    return cache_bytes(cache)


def cache_bytes(cache: Cache) -> int:
    """Bytes of all tensors in a cache, over the whole batch."""
    return sum(x.nbytes for layer in cache.layers for x in _tensors(vars(layer).values()))


def _tensors(values) -> list[Tensor]:
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += _tensors(value)
    return found
