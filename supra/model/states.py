"""The state of a prompt in a file: read the prompt once, then continue from it many times.

    prompt = model(**tokens, use_cache=True).past_key_values
    save_state(prompt, "prompt.safetensors")

    state = load_state("prompt.safetensors", model)
    model.generate(**longer, past_key_values=fork_state(state))

`longer` holds the prompt's tokens and at least one more; only the new ones are computed.
"""

import copy
import json
import zlib
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.cache_utils import Cache

from supra.checkpoint.files import follow_umask
from supra.errors import UserError
from supra.mixers.base import current_name
from supra.mixers.state_policy import Past
from supra.model.attention import attention_modules
from supra.model.cache import MixerLayer, StaticMixerLayer, belong_to, new_cache
from supra.model.modeling import SupraModel
from supra.model.offload import device_of

FORMAT = "supra_state"
SAMPLES = 64  # how many numbers of a parameter go into its checksum
MAX_TOKENS = 2**53  # larger positions are exact in no dtype of theirs


def fork_state(cache: Cache, copies: int = 1) -> Cache:
    """A copy of a cache: it continues from the same state and leaves the original unchanged.

    A state that was computed with gradients keeps them, so that training on continuations reaches
    the prompt. Read the prompt under torch.no_grad() if nothing is trained.

    copies: rows of the new cache per row of the old one, for several continuations in one batch.
    """
    if copies < 1:
        raise UserError(f"copies (={copies}) must be >= 1")
    _check(cache)
    fork = new_cache(len(cache.layers))
    for new, old in zip(fork.layers, cache.layers, strict=True):
        new.state, new.length, new.is_initialized = old.state, old.length, old.is_initialized
        new.model = old.model
        new.map_state(Tensor.clone)
    if copies > 1:
        fork.batch_repeat_interleave(copies)
    return fork


def save_state(cache: Cache, file: str | Path) -> None:
    """Write the states of all layers into one safetensors file, with checksums of the model's
    weights."""
    _check(cache)
    tensors, layers = {}, []
    for i, layer in enumerate(cache.layers):
        found = {} if layer.state is None else layer.state._asdict()
        present = {name: x for name, x in found.items() if x is not None}
        tensors |= {f"{i}.{name}": x.detach().contiguous() for name, x in present.items()}
        layers.append({"length": layer.length, "state": type(layer.state).__name__})
    header = {"format": FORMAT, "layers": json.dumps(layers)}
    model = cache.layers[0].model and cache.layers[0].model()
    if model is not None:
        header["weights"] = json.dumps(weights_of(model))
    save_file(tensors, file, header)
    follow_umask(Path(file))


def load_state(file: str | Path, model: PreTrainedModel, *, other_weights: bool = False) -> Cache:
    """Read the states in `file` into a cache for `model`, on its device.

    other_weights: also accept the state of a model of the same shape with other weights.

    Raises UserError for a damaged file and for the state of another model.
    """
    header, tensors = _read(file)
    layers = _layers(header, file)
    base = next((module for module in model.modules() if isinstance(module, SupraModel)), None)
    if base is None:
        raise UserError(f"model (={type(model).__name__}) must be a converted model")
    states = [attention.mixer.state_type for attention in attention_modules(base)]
    if [x["state"] for x in layers] != [state.__name__ for state in states]:
        raise UserError(
            f"{file} holds the state of a model with other mixers, or another state_policy"
        )
    _check_tensors(tensors, base, layers[0]["length"], file)
    if not other_weights:
        _check_weights(header, base, file)
    cache = new_cache(len(states))
    for i, (layer, state, saved) in enumerate(zip(cache.layers, states, layers, strict=True)):
        found = {name: tensors.get(f"{i}.{name}") for name in state._fields}
        layer.state = state(
            **{n: x if x is None else x.to(device_of(model)) for n, x in found.items()}
        )
        layer.length, layer.is_initialized = saved["length"], True
    belong_to(cache, base)
    return cache


def weights_of(model: nn.Module) -> dict[str, int | None]:
    """A checksum over samples of every parameter, by name; None for parameters that are offloaded,
    sharded or quantised."""
    found: dict[str, int | None] = dict.fromkeys(name for name, _ in model.named_parameters())
    for name, x in model.named_parameters():
        if type(x) is nn.Parameter and x.is_floating_point() and not x.is_meta:
            some = x.detach().flatten()[:: max(1, x.numel() // SAMPLES)]
            found[name] = zlib.crc32(some.cpu().double().numpy().tobytes())
    return found


def _check(cache: Cache) -> None:
    if not cache.layers or not all(isinstance(layer, MixerLayer) for layer in cache.layers):
        raise UserError(
            f"cache (={type(cache).__name__}) must be the past_key_values that a converted model "
            "returned"
        )
    if isinstance(cache.layers[0], StaticMixerLayer):
        raise UserError(
            "cache is static, and its states are overwritten by the next token: read the prompt "
            "without cache_implementation"
        )
    if cache.get_seq_length() == 0:
        raise UserError("cache is empty: run the model on a prompt first, with use_cache=True")


def _read(file: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(file, "pt") as opened:
            header = opened.metadata() or {}
            names = list(opened.keys())
            tensors = {current_name(name): opened.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read as a state: {error}") from error
    if header.get("format") != FORMAT:
        raise UserError(f"{file} is not a state file: write one with save_state()")
    return header, tensors


def _damaged(file: str | Path, what: str) -> NoReturn:
    raise UserError(f"{file} is damaged: {what}; write it again with save_state()")


def _json(header: dict[str, str], name: str, file: str | Path) -> Any:
    try:
        return json.loads(header.get(name, ""))
    except (ValueError, RecursionError):
        _damaged(file, f"its header has no JSON as {name}")


def _layers(header: dict[str, str], file: str | Path) -> list[dict[str, Any]]:
    """The length and the kind of state of every layer."""
    layers = _json(header, "layers", file)
    if not isinstance(layers, list) or not layers or not all(map(_is_layer, layers)):
        _damaged(file, "its header must list a length >= 1 and a state for every layer")
    if len(lengths := {layer["length"] for layer in layers}) > 1:
        _damaged(file, f"its layers have read {min(lengths)} to {max(lengths)} tokens")
    return layers


def _is_layer(layer: Any) -> bool:
    if not isinstance(layer, dict) or not isinstance(layer.get("state"), str):
        return False
    length = layer.get("length")
    return type(length) is int and 1 <= length <= MAX_TOKENS


def _check_tensors(
    tensors: dict[str, Tensor], model: SupraModel, length: int, file: str | Path
) -> None:
    """Check that names, dtypes, shapes and numbers are those of a state of `model`."""
    # key-value caches grow up to a window: a run of one token more than they hold shows their size
    growing = [i for i, module in enumerate(attention_modules(model)) if not module.mixer.recurrent]
    caches = [x for i in growing for name, x in tensors.items() if name.startswith(f"{i}.")]
    places = max((x.shape[1] for x in caches if x.dim() > 1), default=0)
    expected = _without_data(model, min(length, places + 1))
    if different := sorted(expected.keys() ^ tensors.keys()):
        here = "is missing" if different[0] in expected else "is not one of this model's"
        _damaged(file, f"the tensor {different[0]} {here}")
    rows = len(x) if (x := next(iter(tensors.values()))).dim() else 0
    for name, x in tensors.items():
        form = [rows, *expected[name].shape[1:]]
        if rows < 1 or [*x.shape] != form:
            _damaged(file, f"{name} ({[*x.shape]}) must be {form}, with one row or more")
        if x.dtype != expected[name].dtype:
            raise UserError(
                f"{file}: {name} is {x.dtype} and this model's is {expected[name].dtype}: load the "
                "model with the dtype that it was read with, or read the prompt again"
            )
        if not x.isfinite().all():
            _damaged(file, f"{name} has numbers that are not finite")
        if not x.is_floating_point() and x.numel() and not 0 <= x.min() <= x.max() <= length:
            _damaged(file, f"{name} must count from 0 to {length} tokens")


@torch.no_grad()
def _without_data(model: SupraModel, tokens: int) -> dict[str, Tensor]:
    """The states after one row of this many tokens, without data: from a run on the meta device."""
    config = copy.deepcopy(model.config)
    with torch.device("meta"):
        twin = AutoModel.from_config(
            config, dtype=model.dtype, experts_implementation="batched_mm"
        ).eval()
        modules = zip(attention_modules(model), attention_modules(twin), strict=True)
        policies = [module.mixer.policy for module in attention_modules(model)]
        for (_, module), policy in zip(modules, policies, strict=True):
            # the policy `norm` reads the state, and here it has no data
            module.mixer.policy = None if policy and policy.norm is not None else policy
        ids = torch.zeros(1, tokens, dtype=torch.int64)
        cache = twin(ids, use_cache=True).past_key_values
        count = torch.zeros(1, dtype=torch.int64)
    found = {}
    for i, (layer, policy) in enumerate(zip(cache.layers, policies, strict=True)):
        state = layer.state._asdict()
        if policy and policy.norm is not None:
            state |= Past(past_count=count)._asdict()
        found |= {f"{i}.{name}": x for name, x in state.items() if x is not None}
    return found


def _check_weights(header: dict[str, str], model: SupraModel, file: str | Path) -> None:
    """Check that this model's weights made the state, as far as both have checksums."""
    if "weights" not in header:  # an older file, or the model no longer existed when it was written
        return
    theirs, ours = _json(header, "weights", file), weights_of(model)
    if not isinstance(theirs, dict):
        _damaged(file, "its header must have a checksum for every parameter")
    different = theirs.keys() ^ ours.keys() or {
        name
        for name, checksum in ours.items()
        if checksum != theirs[name] and None not in (checksum, theirs[name])
    }
    if different:
        raise UserError(
            f"{file} holds the state of a model with other weights, such as {min(different)}: read "
            "the prompt again with this model, or pass other_weights=True"
        )
