"""Checks config.json before a model is built from it. Each error names the field.

transformers checks the types of fields. Other mistakes would cause arbitrary errors in a family's
own code, or give a model that computes nonsense.
"""

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from supra.checkpoint.json_files import read_fields
from supra.errors import UserError, check_choice, check_whole, foreign_errors
from supra.mixers import resolve_mixer

CONFIG = "config.json"
LAYERS = 1024  # building a layer takes milliseconds; the deepest trained models had 1,000
# the names that all families understand
COUNTS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings",
)  # fmt: skip
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
# endings of field names
SIZES = ("_size", "_dim", "_rank", "_heads", "_experts", "_window")
DIVISORS = (
    "final_logit_softcapping", "attn_logit_softcapping", "query_pre_attn_scalar", "_sparse_step",
)  # fmt: skip
ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")


def check_fields(given: dict[str, Any]) -> None:
    """Raise UserError for fields that transformers would not understand."""
    kind = given.get("model_type")
    if kind is not None and not isinstance(kind, str):
        raise UserError(f"{CONFIG}: model_type (={kind!r}) must be a string, such as 'llama'")
    for name in ("dtype", "torch_dtype"):
        _check_dtype(name, given.get(name))
    if not isinstance(given.get("quantization_config"), dict | None):
        raise UserError(f"{CONFIG}: quantization_config must be a mapping, or be left out")
    kind = given.get("base_model_type", kind)
    if isinstance(kind, str) and kind in CONFIG_MAPPING:
        _check_values(given, CONFIG_MAPPING[kind])


def check_plan(given: dict[str, Any], format_version: int) -> None:
    """Raise UserError unless `supra` in a config names each layer's mixer and the mixers' options
    in this format version, and the family has a language model."""
    plan = given.get("supra")
    again = "convert the model again"
    if plan is not None and not isinstance(plan, dict):
        raise UserError(f"config.json: supra (={plan!r}) must be a mapping: {again}")
    version = (plan or {}).get("format_version")
    if version != format_version or isinstance(version, bool):
        raise UserError(
            f"this checkpoint has supra format_version {version!r}, but this version of supra "
            f"reads {format_version}: update supra, or convert the model again"
        )
    family = given.get("base_model_type")
    if family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(
            f"config.json: base_model_type (={family!r}) is not a causal language model: {again}"
        )
    layers, options = plan.get("layers"), plan.get("options")
    if not isinstance(layers, list) or not all(isinstance(name, str) for name in layers):
        raise UserError(
            f"config.json: supra.layers (={layers!r}) must name the mixer of every layer: {again}"
        )
    if not isinstance(options, dict) or not all(isinstance(x, dict) for x in options.values()):
        raise UserError(
            f"config.json: supra.options (={options!r}) must map mixers to their options: {again}"
        )
    for name in dict.fromkeys(layers):
        _, resolved = resolve_mixer(name, options.get(name))
        # plans of earlier versions have no entry for softmax, which had no options
        if resolved and name not in options and name != "softmax":
            raise UserError(f"config.json: supra.options has no entry for {name!r}: {again}")


def check_generation_config(folder: Path) -> None:
    """Raise UserError unless generation_config.json is a JSON object whose token ids are
    integers."""
    file = folder / "generation_config.json"
    if not file.is_file():
        return
    for name, value in read_fields(file).items():
        ids = value if isinstance(value, list) else [value]
        if name.endswith("_token_id") and not all(isinstance(x, int | None) for x in ids):
            raise UserError(f"{file.name}: {name} (={value!r}) must be a whole number, or a list")


def check_config(config: PreTrainedConfig) -> None:
    """Raise UserError for values that make no sense, in the part of a model that reads text.

    check_fields has already checked the fields of a file, because the config's own code may fail on
    them. This also covers fields from a GGUF file, fields under older names, and defaults.
    """
    config = config.get_text_config(decoder=True)
    _check_values(config.to_dict(), type(config))


def _check_dtype(name: str, value: Any) -> None:
    """Raise UserError unless this is a dtype for weights. The mapping of a composite model
    passes."""
    if value is None or isinstance(value, dict):
        return
    found = getattr(torch, str(value).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UserError(f"{CONFIG}: {name} (={value!r}) must be float32, bfloat16 or float16")


def _check_values(given: dict[str, Any], family: type[PreTrainedConfig]) -> None:
    """Check counts, activations and positions. Lists (one value per layer) and null (derived from
    other fields) pass."""

    def field(name: str) -> tuple[str, Any]:
        """The family's own name of a field, and its value."""
        name = family.attribute_map.get(name, name)
        return f"{CONFIG}: {name}", given.get(name)

    for name, maximum in [*((name, None) for name in COUNTS), ("num_hidden_layers", LAYERS)]:
        name, value = field(name)
        if not isinstance(value, list | dict | None):
            check_whole(name, value, 1, maximum)
    for name in ACTIVATIONS:
        name, value = field(name)
        if isinstance(value, str):
            check_choice(name, value, ACT2FN)
    _check_shares(field)
    _check_numbers(given, {x.name for x in fields(family)})
    window, kinds = given.get("sliding_window"), given.get("layer_types") or ()
    if window == 0 and "sliding_attention" in kinds:
        raise UserError(f"{CONFIG}: sliding_window (=0) must be at least 1 token")
    for name in ("rope_parameters", "rope_scaling"):
        _check_rope(given.get(name))


def _check_shares(field: Callable[[str], tuple[str, Any]]) -> None:
    """Check the number of heads per key head and of experts per token."""
    (name, heads), (of, key_heads) = field("num_attention_heads"), field("num_key_value_heads")
    if _is_number(heads) and _is_number(key_heads) and heads % key_heads:
        raise UserError(f"{name} (={heads}) must be a multiple of {of} (={key_heads})")
    name, used = field("num_experts_per_tok")
    for of, count in map(field, EXPERTS):
        if not isinstance(count, list | dict | None):
            check_whole(of, count, 0)
        # dense models of families with experts have 0 of 0
        if _is_number(used) and _is_number(count) and not min(count, 1) <= used <= count:
            raise UserError(f"{name} (={used}) must be from 1 to {of} (={count})")


def _check_numbers(given: dict[str, Any], known: Collection[str]) -> None:
    """Check numbers by the endings of their names: sizes, where 0 leaves a part out, and constants
    that would turn every output into NaN."""
    for name, value in given.items():
        if name not in known or not _is_number(value):
            continue
        if name.endswith(SIZES):
            check_whole(f"{CONFIG}: {name}", value, 0)
        for endings, holds, rule in (
            (("_eps", "_epsilon"), 0 <= value < math.inf, "0 or more"),
            (("dropout", "_pdrop"), 0 <= value <= 1, "from 0 to 1"),
            (DIVISORS, 0 < value < math.inf, "above 0"),
        ):
            if name.endswith(endings) and not holds:
                raise UserError(f"{CONFIG}: {name} (={value}) must be {rule}")


def _check_rope(rope: Any) -> None:
    """Check rotary positions: one mapping for all layers, or one for each kind of layer."""
    if not isinstance(rope, dict):
        return
    for value in rope.values():
        _check_rope(value)
    if "rope_type" in rope:
        check_choice(f"{CONFIG}: rope_type", rope["rope_type"], ["default", *ROPE_INIT_FUNCTIONS])
    for name in ("rope_theta", "factor"):
        value = rope.get(name)
        if value is not None and not (_is_number(value) and 0 < value < math.inf):
            raise UserError(f"{CONFIG}: {name} (={value!r}) must be a number above 0")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The language model on the meta device: names and shapes of its tensors, without memory."""
    with torch.device("meta"), making_model(config):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


@contextmanager
def making_model(config: PreTrainedConfig) -> Iterator[None]:
    """Turn the errors of a family's code for a config into a UserError."""
    with foreign_errors(f"{CONFIG} does not describe a model"), padding_errors(config):
        yield


@contextmanager
def padding_errors(config: PreTrainedConfig | None) -> Iterator[None]:
    """Name the field when torch's embedding refuses a padding token that is out of range. Only some
    families pass the padding token to it."""
    try:
        yield
    except AssertionError:
        if config is None:
            raise
        config = config.get_text_config(decoder=True)
        pad, count = config.pad_token_id, config.vocab_size
        if pad is not None and not -count <= pad < count:
            raise UserError(
                f"{CONFIG}: pad_token_id (={pad}) must be below vocab_size (={count}), or null"
            ) from None
        raise
