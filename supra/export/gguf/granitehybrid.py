"""Granite 4's hybrid model in llama.cpp: architecture `granitehybrid`."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from supra.errors import UserError
from supra.export.gguf.model import (
    ATTENTION,
    GgufModel,
    backbone,
    changed,
    interleave_pairs,
    renamed,
    rope_base,
    rope_factors,
    text_config,
)
from supra.export.native import NativeModel, NativeTensor

NAMES = {
    **ATTENTION,
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "shared_mlp.input_linear.weight": "ffn_gate.weight",  # and ffn_up.weight
    "shared_mlp.output_linear.weight": "ffn_down.weight",
    "mamba.in_proj.weight": "ssm_in.weight",
    "mamba.conv1d.weight": "ssm_conv1d.weight",
    "mamba.conv1d.bias": "ssm_conv1d.bias",
    "mamba.dt_bias": "ssm_dt.bias",
    "mamba.A_log": "ssm_a",
    "mamba.D": "ssm_d",
    "mamba.norm.weight": "ssm_norm.weight",
    "mamba.out_proj.weight": "ssm_out.weight",
}


def gguf_model(native: NativeModel) -> GgufModel:
    """The model for llama.cpp. Raises UserError for recurrent layers of a width that it does not
    load."""
    config = text_config(native)
    inner = config["mamba_n_heads"] * config["mamba_d_head"]
    if found := width_obstacles(inner, config["hidden_size"]):
        raise UserError(found[0])
    tensors = [x for tensor in native.tensors for x in _tensors(tensor, config)]
    if config["position_embedding_type"] == "rope":
        tensors += rope_factors(config)
    return GgufModel("granitehybrid", _metadata(config, inner), tensors)


def width_obstacles(inner: int, hidden: int) -> list[str]:
    """What keeps recurrent layers of `inner` channels out of a model of `hidden` ones."""
    if inner == 2 * hidden:
        return []
    return [
        f"its recurrent layers are {inner} channels wide, and llama.cpp needs twice the "
        f"hidden_size (={hidden}): convert with sign_pairs=true, from a teacher whose heads "
        "together are as wide as the model"
    ]


def _metadata(config: Mapping[str, Any], inner: int) -> dict[str, Any]:
    rotary = config["position_embedding_type"] == "rope"
    key_heads = config["num_key_value_heads"]
    kinds = config["layer_types"]
    return {
        **backbone(config),
        "feed_forward_length": config["shared_intermediate_size"],
        # a layer without key heads is a recurrent one
        "attention.head_count_kv": [key_heads if kind == "attention" else 0 for kind in kinds],
        "attention.scale": config["attention_multiplier"],
        "embedding_scale": config["embedding_multiplier"],
        "residual_scale": config["residual_multiplier"],
        "logit_scale": config["logits_scaling"],
        "rope.scaling.finetuned": rotary,  # llama.cpp's switch for rotary positions here
        "rope.dimension_count": config["hidden_size"] // config["num_attention_heads"],
        **({"rope.freq_base": rope_base(config)} if rotary else {}),
        "ssm.conv_kernel": config["mamba_d_conv"],
        "ssm.state_size": config["mamba_d_state"],
        "ssm.group_count": config["mamba_n_groups"],
        "ssm.time_step_rank": config["mamba_n_heads"],
        "ssm.inner_size": inner,
    }


def _tensors(tensor: NativeTensor, config: Mapping[str, Any]) -> Iterator[NativeTensor]:
    name, shape = renamed(tensor.name, NAMES), tensor.shape
    kind = name.partition(".")[2].partition(".")[2]  # without "blk.3."
    if kind == "ffn_gate.weight":
        half = shape[0] // 2
        for number, part in enumerate((name, name.replace("gate", "up"))):
            rows = slice(number * half, (number + 1) * half)
            yield changed(tensor, part, partial(_rows, rows), (half, shape[1]))
    elif kind in ("attn_q.weight", "attn_k.weight"):
        query = kind == "attn_q.weight"
        heads = config["num_attention_heads" if query else "num_key_value_heads"]
        yield changed(tensor, name, partial(interleave_pairs, heads), shape)
    elif kind == "ssm_a":
        yield changed(tensor, name, lambda x: -x.float().exp()[:, None], (*shape, 1))
    elif kind == "ssm_d":
        yield changed(tensor, name, lambda x: x[:, None], (*shape, 1))
    elif kind == "ssm_conv1d.weight":
        yield changed(tensor, name, lambda x: x.squeeze(1), (shape[0], shape[2]))
    elif kind == "ssm_norm.weight":
        groups = config["mamba_n_groups"], shape[0] // config["mamba_n_groups"]
        yield changed(tensor, name, lambda x: x.reshape(groups), groups)
    else:
        yield tensor._replace(name=name)


def _rows(rows: slice, weight: Tensor) -> Tensor:
    return weight[rows]
