"""The state of a prompt, kept: read it once, then continue from it as often as needed.

    prompt = model(**tokens, use_cache=True).past_key_values
    save_state(prompt, "prompt.safetensors")

    state = load_state("prompt.safetensors", model)
    model.generate(**longer, past_key_values=fork_state(state))

`longer` are the prompt's tokens and at least one more; only the new ones are computed.
"""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from supra.attention import attention_modules
from supra.cache import MixerLayer, new_cache
from supra.errors import UserError
from supra.files import follow_umask

FORMAT = "supra_state"


def fork_state(cache: Cache, copies: int = 1) -> Cache:
    """A cache that goes on from the same state without changing it.

    A state that was read with gradients keeps them, so that continuations train what made it; read
    a prompt under torch.no_grad() where nothing trains.

    copies: rows of the new cache for each row of the old, for several continuations in one batch.
    """
    if copies < 1:
        raise UserError(f"copies (={copies}) must be >= 1")
    _check(cache)
    fork = new_cache(len(cache.layers))
    for new, old in zip(fork.layers, cache.layers, strict=True):
        new.state, new.length, new.is_initialized = old.state, old.length, old.is_initialized
        new.map_state(Tensor.clone)
    if copies > 1:
        fork.batch_repeat_interleave(copies)
    return fork


def save_state(cache: Cache, file: str | Path) -> None:
    """Write the states of all layers into one safetensors file."""
    _check(cache)
    tensors, layers = {}, []
    for i, layer in enumerate(cache.layers):
        found = {} if layer.state is None else layer.state._asdict()
        present = {name: x for name, x in found.items() if x is not None}
        tensors |= {f"{i}.{name}": x.detach().contiguous() for name, x in present.items()}
        layers.append({"length": layer.length, "state": type(layer.state).__name__})
    save_file(tensors, file, {"format": FORMAT, "layers": json.dumps(layers)})
    follow_umask(Path(file))


def load_state(file: str | Path, model: PreTrainedModel) -> Cache:
    """The states in `file` as a cache for `model`, on its device."""
    try:
        with safe_open(file, "pt") as opened:
            header = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read as a state: {error}") from error
    if header.get("format") != FORMAT:
        raise UserError(f"{file} is no state: write one with save_state()")
    layers = json.loads(header["layers"])
    states = [attention.mixer.state_type for attention in attention_modules(model)]
    if [x["state"] for x in layers] != [state.__name__ for state in states]:
        raise UserError(
            f"{file} holds the state of a model with other mixers, or another state_policy"
        )
    cache = new_cache(len(states))
    for i, (layer, state, saved) in enumerate(zip(cache.layers, states, layers, strict=True)):
        found = {name: tensors.get(f"{i}.{name}") for name in state._fields}
        layer.state = state(**{n: x if x is None else x.to(model.device) for n, x in found.items()})
        layer.length, layer.is_initialized = saved["length"], True
    return cache


def _check(cache: Cache) -> None:
    if not cache.layers or not all(isinstance(layer, MixerLayer) for layer in cache.layers):
        raise UserError(
            f"cache (={type(cache).__name__}) must be the past_key_values that a converted model "
            "returned"
        )
    if cache.get_seq_length() == 0:
        raise UserError("cache is empty: run the model on a prompt first, with use_cache=True")
