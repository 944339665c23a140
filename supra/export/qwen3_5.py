"""The target `qwen3_5`: a converted model as the text model of Qwen3.5 (`qwen3_5_text`).

Its recurrent layers are the mixer `gated_deltanet`. Its attention layers have a norm of queries and
keys and an output gate. The gate is undone: with weights of zero it is σ(0) = ½, and the output
projection is doubled.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from supra.checkpoint.opening import Checkpoint
from supra.export.converted import (
    KEPT,
    MULTIPLIERS,
    Converted,
    Structure,
    bounded,
    common_fields,
    common_obstacles,
    constant,
    rewritten,
)
from supra.export.native import NativeModel, NativeTensor
from supra.mixers.signs import signed

MIXER = "gated_deltanet"
FORMS: tuple[tuple[str, dict[str, Any]], ...] = ((MIXER, {}),)


def obstacles(config: PreTrainedConfig) -> list[str]:
    """What keeps a converted model out of this architecture, each with the way out; [] if it can be
    exported."""
    structure = Structure(config)
    found = list(common_obstacles(structure, MIXER))
    options = structure.options(MIXER)
    if options.get("beta_range", 1.0) != 1.0:
        found.append(f"its beta_range is {options['beta_range']}: convert with beta_range=1")
    if options.get("rotary"):
        found.append("its gated_deltanet rotates queries and keys: convert with rotary=false")
    for name in MULTIPLIERS:
        if (value := getattr(config, name, 1.0)) != 1.0:
            found.append(f"its {name} is {value}, and Qwen3.5 has none: export to granite")
    lacking = {layer: _lacking(structure, layer) for layer in structure.kept}
    for layer in [layer for layer, part in lacking.items() if part][:1]:
        found.append(
            f"layer {layer} keeps attention without {lacking[layer]}, which Qwen3.5 has: convert "
            "without --keep-attention, or for granite"
        )
    return found


def _lacking(structure: Structure, layer: int) -> str | None:
    """What a kept layer lacks of an attention layer of Qwen3.5; None if nothing."""
    if not hasattr(structure.attention[layer], "q_norm"):
        return "a norm of queries and keys"
    return None if structure.rotates(layer) else "rotary positions"


def native_model(checkpoint: Checkpoint, idle_attention: bool = False) -> NativeModel:
    """The converted model in a checkpoint, as this architecture.

    idle_attention: append an attention layer whose output is 0.
    """
    return rewritten(
        checkpoint,
        idle_attention,
        config=native_config,
        kept=_kept,
        recurrent=_recurrent,
        around=_around,
        final_norm=lambda model, name: model.changed(name, name, _centred),
        idle=_idle,
    )


def native_config(structure: Structure, idle_attention: bool = False) -> dict[str, Any]:
    """The fields of config.json. transformers and vLLM read `layer_types`; SGLang and MLX read the
    interval of attention layers instead, and SGLang reads the rotary share beside the rest."""
    config, layers = structure.config, list(structure.layers)
    kinds = ["full_attention" if mixer == KEPT else "linear_attention" for mixer in layers]
    kinds += ["full_attention"] * idle_attention
    fields = common_fields(config, len(kinds)) | {
        "architectures": ["Qwen3_5ForCausalLM"],
        "model_type": "qwen3_5_text",
        "intermediate_size": config.intermediate_size,
        "layer_types": kinds,
        "head_dim": _head_size(structure),
    }
    share = fields["rope_parameters"].setdefault("partial_rotary_factor", 1.0)
    fields["partial_rotary_factor"] = share
    fields |= _linear_fields(structure)
    if idle_attention:
        fields["num_key_value_heads"] = 1  # the smallest cache
    if (interval := _interval(kinds)) is not None:
        fields["full_attention_interval"] = interval
    return fields


def _linear_fields(structure: Structure) -> dict[str, Any]:
    """The sizes of the recurrent layers: every query head has its own key and value."""
    mixer = structure.attention[structure.recurrent[0]].mixer
    shape, blocks = mixer.shape, len(mixer.signs)
    return {
        "linear_num_key_heads": shape.query_heads,
        "linear_num_value_heads": shape.query_heads,
        "linear_key_head_dim": blocks * shape.head_size,
        "linear_value_head_dim": blocks * shape.value_size,
        "linear_conv_kernel_dim": mixer.conv.weight.shape[1],
    }


def _head_size(structure: Structure) -> int:
    return structure.attention[0].mixer.shape.head_size


def _interval(kinds: list[str]) -> int | None:
    """n if exactly every n-th layer is attention; else None."""
    full = [place + 1 for place, kind in enumerate(kinds) if kind == "full_attention"]
    regular = full and full == list(range(full[0], len(kinds) + 1, full[0]))
    return full[0] if regular else None


def _centred(weight: Tensor) -> Tensor:
    """The weight of a norm that multiplies by 1 + w."""
    return weight - 1


def _around(model: Converted, layer: int) -> Iterator[NativeTensor]:
    """The norms and the MLP of a layer."""
    path = f"model.layers.{layer}"
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield model.changed(f"{path}.{name}.weight", f"{path}.{name}.weight", _centred)
    for name in ("gate_proj", "up_proj", "down_proj"):
        yield model.inherited(f"{path}.mlp.{name}.weight", f"{path}.mlp.{name}.weight")


def _kept(model: Converted, layer: int) -> Iterator[NativeTensor]:
    """The attention of a layer that keeps it."""
    path = f"model.layers.{layer}.self_attn"
    shape = model.structure.attention[layer].mixer.shape
    size = 2 * shape.query_heads * shape.head_size, shape.hidden_size
    name = f"{path}.q_proj.weight"
    yield NativeTensor(name, size, partial(_with_gate, model, name, shape.query_heads))
    for name in (f"{path}.k_proj.weight", f"{path}.v_proj.weight"):
        yield model.inherited(name, name)
    for name in (f"{path}.q_norm.weight", f"{path}.k_norm.weight"):
        yield model.changed(name, name, _centred)
    name = f"{path}.o_proj.weight"
    yield model.changed(name, name, lambda weight: 2 * weight)


def _with_gate(model: Converted, name: str, heads: int) -> Tensor:
    """The projection of each head's query, followed by that of its gate, which is 0."""
    query = model.load(name).unflatten(0, (heads, -1))
    return torch.cat([query, torch.zeros_like(query)], dim=1).flatten(0, 1)


def _recurrent(model: Converted, layer: int) -> Iterator[NativeTensor]:
    """The mixer of a layer, with its projections."""
    path = f"model.layers.{layer}.linear_attn"
    mixer = model.structure.attention[layer].mixer
    shape, blocks = mixer.shape, len(mixer.signs)
    channels, taps = mixer.conv.weight.shape
    hidden, values = shape.hidden_size, shape.query_heads * blocks * shape.value_size

    def made(name: str, size: tuple[int, ...], make: Callable[[], Tensor]) -> NativeTensor:
        return NativeTensor(f"{path}.{name}", size, make)

    yield made("in_proj_qkv.weight", (channels, hidden), partial(_features, model, layer))
    yield model.of_mixer(f"{path}.in_proj_z.weight", layer, "output_gate.weight")
    yield model.of_mixer(f"{path}.in_proj_b.weight", layer, "strength.weight")
    yield model.of_mixer(f"{path}.in_proj_a.weight", layer, "dt.weight")
    yield model.of_mixer(f"{path}.dt_bias", layer, "dt.bias")
    yield made("A_log", (shape.query_heads,), lambda: bounded(model.mixer(layer, "A_log")))
    convolution = partial(model.convolution, layer, "weight")
    yield made("conv1d.weight", (channels, 1, taps), lambda: convolution()[:, None])
    yield constant(f"{path}.norm.weight", (blocks * shape.value_size,), 1.0)
    yield made("out_proj.weight", (hidden, values), partial(_outputs, model, layer))


def _features(model: Converted, layer: int) -> Tensor:
    """The projections to queries, keys and values, as sign pairs. The direction in which all hidden
    states are alike carries the biases."""
    mixer = model.structure.attention[layer].mixer
    direction = model.mixer(layer, "constant.weight")  # [1, D]
    joined, end = torch.empty(mixer.conv.weight.shape[0], mixer.shape.hidden_size), 0
    for part in ("query", "key", "value"):
        weight = signed(model.heads(layer, part[0]).mT, mixer.signs).mT  # [Hq, P · K, D]
        weight += model.mixer(layer, f"{part}_bias")[..., None] * direction
        begin, end = end, end + weight[..., 0].numel()
        joined[begin:end] = weight.flatten(0, 1)
    return joined


def _outputs(model: Converted, layer: int) -> Tensor:
    """The output projection, with the factors on each head's channels."""
    return (model.outputs(layer) * model.scales(layer)).flatten(1)


def _idle(config: dict[str, Any], layer: int) -> Iterator[NativeTensor]:
    """An attention layer that changes nothing: the last projections of attention and MLP are 0."""
    path, hidden = f"model.layers.{layer}", config["hidden_size"]
    inner, size = config["intermediate_size"], config["head_dim"]
    queries, keys = (config[f"num_{n}_heads"] * size for n in ("attention", "key_value"))
    shapes = {
        "self_attn.q_proj": (2 * queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "self_attn.q_norm": (size,),
        "self_attn.k_norm": (size,),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    for name, shape in shapes.items():
        yield constant(f"{path}.{name}.weight", shape, 0.0)
