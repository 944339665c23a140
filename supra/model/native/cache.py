"""The states of native layers in a cache of transformers, in the form that mixers have."""

from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
)

from supra.errors import UserError
from supra.mixers import Mixer, MixerInputs
from supra.model.cache import MixerLayer, detach


class NativeState(MixerLayer, LinearAttentionCacheLayerMixin):
    """The state of a native layer. transformers makes its masks from other layers of the cache than
    those for linear attention, and this is one of them."""

    @property
    def has_previous_state(self) -> dict[int, bool]:
        return {0: self.state is not None}

    def mix(self, mixer: Mixer, inputs: MixerInputs) -> Tensor:
        self.length += inputs.query.shape[1]
        return super().mix(mixer, inputs)

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise UserError(
            "past_key_values hold states of another form than this model's: pass the cache that "
            "this model returned, or none"
        )

    conv_states = property(_refuse)
    update_conv_state = update_recurrent_state = _refuse


class NativeStateAndKeys(MixerLayer):
    """The state of a native layer beside attention, as in Falcon-H1, and the keys and values of
    that attention."""

    def __init__(self):
        super().__init__()
        self.attention = DynamicLayer()

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        self.length += key_states.shape[-2]
        return self.attention.update(key_states, value_states, *args, **kwargs)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.attention.get_mask_sizes(query_length)

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self.attention.crop(tokens_to_remove)

    def reset(self) -> None:
        super().reset()
        self.attention.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.attention.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.attention.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self.attention.batch_select_indices(indices)

    def detach(self) -> None:
        super().detach()
        detach(Cache(layers=[self.attention]))


def state_layer(cache: Cache | None, index: int) -> MixerLayer | None:
    """The layer of a cache that holds a native layer's state; one of transformers is replaced while
    it is empty. Raises UserError for a cache that another form of the layer has filled."""
    if cache is None:
        return None
    if index >= len(cache.layers):
        raise UserError(
            f"past_key_values (={type(cache).__name__}) has no layer {index}: make it with "
            "DynamicCache(config=model.config)"
        )
    layer = cache.layers[index]
    if isinstance(layer, MixerLayer):
        return layer
    if any(layer.has_previous_state.values()):
        raise UserError(
            "past_key_values were filled before supra.accelerate() or a state_policy changed the "
            "form of their states: begin with an empty cache"
        )
    hybrid = isinstance(layer, CacheLayerMixin)
    if hybrid and not isinstance(layer, LinearAttentionAndFullAttentionLayer):
        raise UserError(
            f"past_key_values (={type(layer).__name__} in layer {index}) must keep the keys of all "
            "tokens: pass DynamicCache(config=model.config), or none"
        )
    cache.layers[index] = NativeStateAndKeys() if hybrid else NativeState()
    return cache.layers[index]
