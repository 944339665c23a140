"""The cache of a converted model: layers that hold the states of all mixers."""

import inspect
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, StaticCache

from supra.errors import UserError
from supra.mixers import Mixer, MixerInputs

# What models call the cache that they take and return; Mamba-2 in transformers has its own name.
CACHES = ("past_key_values", "cache_params")


class _Call(NamedTuple):
    """One recorded call, kept so that some of its tokens can be undone."""

    mixer: Mixer
    inputs: MixerInputs
    before: Any  # the state, a NamedTuple or None
    tokens: int


class MixerLayer(CacheLayerMixin):
    """Holds the state of one layer's mixer: a NamedTuple of tensors with the batch first.

    transformers' own linear-attention layer cannot be used: without a convolution it never reports
    a previous state, and a cache of such layers alone does not know its length.

    A state cannot forget its last tokens, but assisted decoding rolls back. So after
    `activate_past_recording`, every call is kept until the next `crop`. `crop` returns to the state
    before the calls that it undoes and mixes the tokens that stay once more.
    """

    is_croppable = True

    def __init__(self):
        super().__init__()
        self.state: NamedTuple | None = None
        self.length = 0
        self.model: weakref.ref | None = None  # the model that read these tokens
        self.record_past = False
        self._calls: list[_Call] = []

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"model": None}  # a weak reference cannot be pickled

    def mix(self, mixer: Mixer, inputs: MixerInputs) -> Tensor:
        """Run the mixer on the tokens of one call and keep the state after them."""
        if self.record_past:
            self._calls.append(_Call(mixer, inputs, self.state, inputs.query.shape[1]))
        output, self.state = mixer(inputs, self.state, return_state=True)
        self.is_initialized = True
        return output

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        """Count the tokens. Keys and values pass unchanged: a mixer needs only this call's."""
        self.length += key_states.shape[-2]
        return key_states, value_states

    def activate_past_recording(self) -> None:
        self.record_past = True

    def end_recording(self) -> None:
        """Forget the recorded calls, which hold one state for every decoded token."""
        self.record_past = False
        self._calls.clear()

    @torch.no_grad()
    def crop(self, tokens_to_remove: int) -> None:
        """Roll back the last tokens: three of them for -3, as in transformers' own layers. At most
        the tokens since recording began or since the last crop."""
        if tokens_to_remove > 0:
            raise UserError(
                f"crop (={tokens_to_remove}) must be <= 0: minus the number of tokens to remove"
            )
        surplus = -tokens_to_remove
        if surplus > (recorded := sum(call.tokens for call in self._calls)):
            raise UserError(
                f"crop ({surplus} tokens) goes back further than what was recorded ({recorded}): "
                "call activate_past_recording() on the cache before reading tokens to remove later"
            )
        self.length -= surplus
        while surplus > 0:
            call = self._calls.pop()
            self.state = call.before
            if call.tokens > surplus:
                kept = call.inputs.first(call.tokens - surplus)
                _, self.state = call.mixer(kept, call.before, return_state=True)
            surplus -= call.tokens
        self._calls.clear()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def reset(self) -> None:
        self.state, self.length, self.is_initialized = None, 0, False
        self.end_recording()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.map_state(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.map_state(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.map_state(lambda x: x[indices])

    def detach(self) -> None:
        """Cut the graph: no gradient reaches tokens that were read before."""
        self.map_state(Tensor.detach)

    def map_state(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace each tensor of the state by `function` of it."""
        if self._calls:
            raise UserError("rows of a cache that records its past cannot change: crop it first")
        if self.state is not None:
            self.state = type(self.state)(*(x if x is None else function(x) for x in self.state))


class StaticMixerLayer(MixerLayer):
    """Holds the state in the same tensors from token to token, for compiled decoding.

    A compiled step is compiled again when shapes, strides or numbers of Python change. So a step of
    one token writes into the tensors that the prompt has left, and the length is a tensor, too.
    """

    is_compileable = True
    is_croppable = False

    def __init__(self, max_cache_len: int):
        super().__init__()
        self.max_cache_len = max_cache_len
        self.length = torch.tensor(0)

    def mix(self, mixer: Mixer, inputs: MixerInputs) -> Tensor:
        if self.state is not None and inputs.query.shape[1] == 1:
            output, end = mixer(inputs, self.state, return_state=True)
            for old, new in zip(self.state, end, strict=True):
                if new is not old:
                    old.copy_(new)
            return output
        before = None if self.state is None else mixer.growing_state(self.state)
        output, end = mixer(inputs, before, return_state=True)
        self.state = mixer.static_state(end, inputs, self.max_cache_len)
        self.length = self.length.to(inputs.query.device)
        self.is_initialized = True
        return output

    def get_seq_length(self) -> int | Tensor:
        return self.length if torch.compiler.is_compiling() else int(self.length)

    def get_max_length(self) -> int:
        return self.max_cache_len

    def reset(self) -> None:
        super().reset()
        self.length = torch.tensor(0)

    def activate_past_recording(self) -> None:
        raise UserError(
            "a static cache overwrites its states and cannot roll back: leave "
            "cache_implementation out for assisted decoding"
        )


def cache_name(model: nn.Module) -> str:
    """The name of the argument in which any model of transformers takes its cache."""
    known = inspect.signature(model.forward).parameters
    return next((name for name in CACHES if name in known), CACHES[0])


def cache_in(output: Any) -> dict[str, Cache]:
    """The cache in a model's output, under the name in which the model takes it: {} if there is
    none."""
    found = {name: getattr(output, name, None) for name in CACHES}
    return {name: cache for name, cache in found.items() if cache is not None}


def cache_length(cache: Cache) -> int:
    """The number of tokens that a cache has read. Layers whose keys were dropped count fewer."""
    return max(x.get_seq_length() for x in cache.layers if isinstance(x, CacheLayerMixin))


def detach(cache: Cache) -> None:
    """Cut the graph of all states, keys and values."""
    for layer in cache.layers:
        if isinstance(layer, MixerLayer):
            layer.detach()
        elif layer.is_initialized:  # attention of transformers
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()


def new_cache(layers: int) -> Cache:
    """An empty cache for a converted model of that many layers."""
    return Cache(layers=[MixerLayer() for _ in range(layers)])


def new_static_cache(layers: int, max_cache_len: int) -> Cache:
    """The same for compiled decoding. max_cache_len: tokens that layers with attention can hold."""
    return Cache(layers=[StaticMixerLayer(max_cache_len) for _ in range(layers)])


def check_rows(cache: Cache, batch: int) -> None:
    """Raise UserError if a converted model's cache does not have the `batch` rows of the input."""
    states = (layer.state for layer in cache.layers if layer.state is not None)
    rows = next((x.shape[0] for state in states for x in state if x is not None), batch)
    if rows == batch:
        return
    way_out = "pass the rows that were read before, in the same order"
    if batch % rows == 0:  # num_beams and num_return_sequences multiply the rows of a prompt
        way_out = f"pass fork_state(past_key_values, copies={batch // rows}) of supra.states"
    raise UserError(f"past_key_values hold {rows} rows and the input has {batch}: {way_out}")


def belong_to(cache: Cache, model: nn.Module) -> None:
    """Record which model fills a cache, so that a saved state can hold checksums of its weights.

    The reference is weak: it does not keep the model alive.
    """
    if not torch.compiler.is_compiling():
        for layer in cache.layers:
            layer.model = weakref.ref(model)


def adopt_cache(cache: Cache, layers: int) -> None:
    """Replace the layers of an empty cache of any kind by those of a converted model, in place. A
    static cache gets layers that decode compiled."""
    own = all(isinstance(layer, MixerLayer) for layer in cache.layers)
    if own and len(cache.layers) == layers:
        return
    if torch.compiler.is_exporting():
        raise UserError(
            f"past_key_values (={type(cache).__name__}) keeps keys and values in buffers, which a "
            "recurrent model would leave empty: export supra.export.DecodingStep"
        )
    if cache.get_seq_length() > 0:
        raise UserError(
            f"past_key_values (={type(cache).__name__}) holds another model's tokens: "
            "pass the cache that this model returned, or none"
        )
    if isinstance(cache, StaticCache):
        longest = max(layer.max_cache_len for layer in cache.layers)
        cache.layers = new_static_cache(layers, longest).layers
    else:
        cache.layers = new_cache(layers).layers
    cache.layer_class_to_replicate = None
    cache.offloading = False  # a state of constant size stays where it is
