"""Transformers in llama.cpp: the teachers that exported models are compared with."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from transformers import PreTrainedConfig

from supra.checkpoint.opening import Checkpoint
from supra.errors import UserError
from supra.export.gguf.model import (
    ATTENTION,
    MLP,
    GgufModel,
    backbone,
    changed,
    interleave_pairs,
    renamed,
    rope_base,
    rope_factors,
)
from supra.export.native import NativeTensor

NAMES = {
    **ATTENTION,
    **MLP,
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "self_attn.q_proj.bias": "attn_q.bias",
    "self_attn.k_proj.bias": "attn_k.bias",
    "self_attn.v_proj.bias": "attn_v.bias",
}
ARCHITECTURES = ("llama", "qwen2", "qwen3")  # llama.cpp has transformers' names for these
INTERLEAVED = "llama"  # the one whose rotary pairs are neighbours


def gguf_model(checkpoint: Checkpoint) -> GgufModel:
    """A transformer for llama.cpp. Raises UserError for one of another family."""
    config = checkpoint.config()
    if config.model_type not in ARCHITECTURES:
        raise UserError(
            f"model {checkpoint.name!r} is a {config.model_type}: only "
            f"{', '.join(ARCHITECTURES)} are written to GGUF as teachers"
        )
    fields = config.to_dict()
    factors = rope_factors(fields)
    if factors and config.model_type != INTERLEAVED:
        raise UserError(
            f"model {checkpoint.name!r} scales rotary positions, which llama.cpp does for no "
            f"{config.model_type}"
        )
    tensors = [*_tensors(checkpoint, config), *factors]
    return GgufModel(config.model_type, _metadata(config, fields), tensors)


def _metadata(config: PreTrainedConfig, fields: Mapping[str, Any]) -> dict[str, Any]:
    size = _head_size(config)
    return {
        **backbone(fields),
        "feed_forward_length": config.intermediate_size,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": size,
        "attention.value_length": size,
        "rope.dimension_count": size,
        "rope.freq_base": rope_base(fields),
    }


def _head_size(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _tensors(checkpoint: Checkpoint, config: PreTrainedConfig) -> Iterator[NativeTensor]:
    reader = checkpoint.tensors(config)
    for name, spec in reader.specs.items():
        tensor = NativeTensor(name, spec.shape, partial(reader.load, name))
        new = renamed(name, NAMES)
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        part = name.split(".")[-2]
        if config.model_type == INTERLEAVED and part in heads:
            yield changed(tensor, new, partial(interleave_pairs, heads[part]), spec.shape)
        else:
            yield tensor._replace(name=new)
