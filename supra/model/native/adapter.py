"""Which models of transformers are recurrent themselves, and where their recurrent layers are.

`adopt` gives every such layer a mixer, its `recurrence`, that says what its states, decays and
channels are. It changes no output. `accelerate` makes the layers run through their mixers.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from supra.errors import UserError
from supra.mixers.state_policy import StatePolicy
from supra.model.cache import new_cache
from supra.model.families import NATIVE
from supra.model.native.cache import state_layer
from supra.model.native.layers import (
    FalconH1Layer,
    GatedDeltaLayer,
    Mamba2Layer,
    NativeLayer,
    Qwen3NextLayer,
    insert_recurrence,
)
from supra.model.rows import document_boundaries

# The layers of transformers, by the names of their classes.
LAYERS: dict[str, type[NativeLayer]] = {
    "Mamba2Mixer": Mamba2Layer,
    "BambaMixer": Mamba2Layer,
    "GraniteMoeHybridMambaLayer": Mamba2Layer,
    "FalconH1Mixer": FalconH1Layer,
    "Qwen3NextGatedDeltaNet": Qwen3NextLayer,
    "Qwen3_5GatedDeltaNet": GatedDeltaLayer,
    "Qwen3_5MoeGatedDeltaNet": GatedDeltaLayer,
}
ACTIVATIONS = ("silu", "swish")  # of the short convolution, in the kernels


def adopt(model: nn.Module) -> dict[int, NativeLayer]:
    """The native recurrent layers of a model, by layer, each with its mixer `recurrence`; {} for
    models that have none.

    Outputs stay bit for bit what they were, unless the model's config has a `state_policy`.
    """
    found = {}
    for layer in [*model.modules()]:
        own = LAYERS.get(type(layer).__name__)
        if own is not None and layer.activation in ACTIVATIONS:
            insert_recurrence(layer, own)
            if (policy := getattr(model.config, "state_policy", None)) is not None:
                layer.recurrence.set_policy(StatePolicy.from_dict(policy), layer.layer_idx)
        if isinstance(layer, NativeLayer):
            found[layer.layer_idx] = layer
    return found


def accelerate(model: PreTrainedModel) -> PreTrainedModel:
    """Run the recurrent layers of a model of transformers with this project's kernels, in place.

    Takes mamba2, bamba, falcon_h1, granitemoehybrid, qwen3_next, qwen3_5 and qwen3_5_moe, loaded as
    usual. Logits are those of transformers up to rounding, in prefill and decoding, with or without
    padding. Weights and their names stay, so the model is saved as before. A `state_policy` in the
    model's config is applied.

    Returns the model. Raises UserError for a model that has no such layers.
    """
    layers = adopt(model)
    if not layers:
        raise UserError(
            f"model_type {model.config.model_type!r} has no recurrent layers that supra can run: "
            f"it runs those of {', '.join(NATIVE)}, with hidden_act silu"
        )
    for layer in layers.values():
        layer.accelerated = True
    return model


@contextmanager
def documents_apart(model: nn.Module, position_ids: Tensor) -> Iterator[None]:
    """Inside, native layers read every document of packed rows from an empty state, as converted
    models do. position_ids: [B, T] of those rows, which begin anew with each document."""
    layers = adopt(model).values()
    found = document_boundaries(position_ids, len(position_ids)) if layers else None
    for layer in layers:
        layer.bounds = None if found is None else found[0, 0, 0]
    try:
        yield
    finally:
        for layer in layers:
            layer.bounds = None


def empty_cache(model: PreTrainedModel) -> Cache:
    """An empty cache for a converted or a native model. Native layers run through their mixers when
    they get one of these."""
    native = adopt(model)
    if not native:
        return new_cache(model.config.num_hidden_layers)
    cache = DynamicCache(config=model.config)
    for index in native:
        state_layer(cache, index)
    return cache
