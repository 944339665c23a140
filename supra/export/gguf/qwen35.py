"""Qwen3.5's text model in llama.cpp: architecture `qwen35`."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from supra.errors import UserError
from supra.export.gguf.model import (
    ATTENTION,
    MLP,
    GgufModel,
    backbone,
    changed,
    renamed,
    rope_base,
    text_config,
)
from supra.export.native import NativeModel, NativeTensor

NAMES = {
    **ATTENTION,
    **MLP,
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "linear_attn.in_proj_qkv.weight": "attn_qkv.weight",
    "linear_attn.in_proj_z.weight": "attn_gate.weight",
    "linear_attn.in_proj_b.weight": "ssm_beta.weight",
    "linear_attn.in_proj_a.weight": "ssm_alpha.weight",
    "linear_attn.conv1d.weight": "ssm_conv1d.weight",
    "linear_attn.dt_bias": "ssm_dt.bias",
    "linear_attn.A_log": "ssm_a",
    "linear_attn.norm.weight": "ssm_norm.weight",
    "linear_attn.out_proj.weight": "ssm_out.weight",
}


def gguf_model(native: NativeModel) -> GgufModel:
    """The model for llama.cpp. Raises UserError for linear layers that it lays out otherwise."""
    config = text_config(native)
    if config["linear_num_key_heads"] != config["linear_num_value_heads"] or (
        config["linear_key_head_dim"] != config["linear_value_head_dim"]
    ):
        raise UserError("linear layers need as many key heads as value heads, of the same size")
    tensors = [_tensor(tensor) for tensor in native.tensors]
    return GgufModel("qwen35", _metadata(config), tensors)


def _metadata(config: Mapping[str, Any]) -> dict[str, Any]:
    heads, size = config["linear_num_value_heads"], config["linear_value_head_dim"]
    rotated = int(config["head_dim"] * config["rope_parameters"].get("partial_rotary_factor", 0.25))
    return {
        **backbone(config),
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "attention.recurrent_layers": [
            kind == "linear_attention" for kind in config["layer_types"]
        ],
        "rope.freq_base": rope_base(config),
        "rope.dimension_count": rotated,
        # time, height and width take turns over the pairs. Text gives all three the same position,
        # but a pair that belongs to none of them is not rotated at all.
        "rope.dimension_sections": [(rotated // 2 + 2 - axis) // 3 for axis in range(3)] + [0],
        "ssm.conv_kernel": config["linear_conv_kernel_dim"],
        "ssm.state_size": config["linear_key_head_dim"],
        "ssm.group_count": config["linear_num_key_heads"],
        "ssm.time_step_rank": heads,
        "ssm.inner_size": heads * size,
    }


def _tensor(tensor: NativeTensor) -> NativeTensor:
    name, shape = renamed(tensor.name, NAMES), tensor.shape
    if name.endswith("ssm_a"):
        return changed(tensor, name, lambda x: -x.float().exp(), shape)
    if name.endswith("ssm_conv1d.weight"):
        return changed(tensor, name, lambda x: x.squeeze(1), (shape[0], shape[2]))
    if name.endswith("norm.weight") and not name.endswith("ssm_norm.weight"):
        return changed(tensor, name, _plus_one, shape)
    return tensor._replace(name=name)


def _plus_one(weight: Tensor) -> Tensor:
    """transformers' norms of this family multiply by 1 + weight."""
    return weight.float() + 1
