"""The target `granite`: a converted model as a hybrid of Granite 4 (`granitemoehybrid`).

Its recurrent layers are the mixer `mamba2` in the form granite. Its attention layers are Llama's.
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

MIXER = "mamba2"
FORMS = ((MIXER, {"form": "granite"}),)


def obstacles(config: PreTrainedConfig) -> list[str]:
    """What keeps a converted model out of this architecture, each with the way out; [] if it can be
    exported."""
    structure = Structure(config)
    found = [*common_obstacles(structure, MIXER), *_kept_obstacles(structure)]
    if MIXER not in structure.layers:
        return found
    if structure.options(MIXER).get("form") != "granite":
        return [*found, "its mamba2 has another form: convert with --mixer-option form=granite"]
    fields, hidden = _mamba_fields(structure), config.hidden_size
    heads, channels = fields["mamba_n_heads"], fields["mamba_d_head"]
    if heads * channels % hidden:
        found.append(
            f"its {heads} heads of {channels} channels are no multiple of hidden_size (={hidden}), "
            "as Granite has them: convert another model"
        )
    return found


def _kept_obstacles(structure: Structure) -> Iterator[str]:
    """What a kept layer has that an attention layer of Granite has not."""
    config = structure.config
    for layer in structure.kept:
        attention = structure.attention[layer]
        shape = attention.mixer.shape
        if hasattr(attention, "q_norm"):
            yield (
                f"layer {layer} keeps attention with a norm of queries and keys, which Granite's "
                "has not: convert without --keep-attention, or for qwen3_5"
            )
            return
        if shape.query_heads * shape.head_size != config.hidden_size:
            yield (
                f"layer {layer} keeps attention with {shape.query_heads} heads of size "
                f"{shape.head_size}, and Granite's have {config.hidden_size} channels together: "
                "convert without --keep-attention"
            )
            return
    if len({structure.rotates(layer) for layer in structure.kept}) > 1:
        yield (
            "some kept layers have rotary positions and some have none: convert with "
            "--keep-attention of one kind"
        )


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
        final_norm=lambda model, name: model.inherited(name, name),
        idle=_idle,
    )


def native_config(structure: Structure, idle_attention: bool = False) -> dict[str, Any]:
    """The fields of config.json, in words that transformers, vLLM, SGLang and MLX all read: SGLang
    reads `rope_theta` outside of `rope_parameters`."""
    config = structure.config
    kinds = ["attention" if mixer == KEPT else "mamba" for mixer in structure.layers]
    kinds += ["attention"] * idle_attention
    rotated = any(structure.rotates(layer) for layer in structure.kept)
    fields = common_fields(config, len(kinds)) | {
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "model_type": "granitemoehybrid",
        "layer_types": kinds,
        "intermediate_size": config.intermediate_size,
        "shared_intermediate_size": config.intermediate_size,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "position_embedding_type": "rope" if rotated else "nope",
        "attention_multiplier": structure.attention[0].scaling,
        "rope_theta": config.rope_parameters["rope_theta"],
        **_mamba_fields(structure),
        **{name: getattr(config, name, 1.0) for name in MULTIPLIERS},
    }
    if idle_attention:
        divides = config.hidden_size % config.num_attention_heads == 0
        fields["num_attention_heads"] = config.num_attention_heads if divides else 1
        fields["num_key_value_heads"] = 1  # the smallest cache
    return fields


def _mamba_fields(structure: Structure) -> dict[str, Any]:
    """The sizes of the recurrent layers: every head has its own B and C."""
    mixer = structure.attention[structure.recurrent[0]].mixer
    shape, blocks = mixer.shape, len(mixer.signs)
    return {
        "mamba_n_heads": shape.query_heads,
        "mamba_n_groups": shape.query_heads,
        "mamba_d_head": blocks * shape.value_size,
        "mamba_d_state": blocks * shape.head_size,
        "mamba_d_conv": mixer.conv.weight.shape[1],
        "mamba_expand": shape.query_heads * blocks * shape.value_size // shape.hidden_size,
        "mamba_chunk_size": 256,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
    }


def _around(model: Converted, layer: int) -> Iterator[NativeTensor]:
    """The norms and the MLP of a layer."""
    path = f"model.layers.{layer}"
    for name in (f"{path}.input_layernorm.weight", f"{path}.post_attention_layernorm.weight"):
        yield model.inherited(name, name)
    gate, up = (f"{path}.mlp.{name}_proj.weight" for name in ("gate", "up"))
    rows, columns = model.reader.specs[gate].shape
    joined = partial(_joined, model, gate, up)
    yield NativeTensor(f"{path}.shared_mlp.input_linear.weight", (2 * rows, columns), joined)
    down = f"{path}.mlp.down_proj.weight"
    yield model.inherited(f"{path}.shared_mlp.output_linear.weight", down)


def _joined(model: Converted, *names: str) -> Tensor:
    return torch.cat([model.reader.load(name) for name in names])


def _kept(model: Converted, layer: int) -> Iterator[NativeTensor]:
    """The attention of a layer that keeps it."""
    for part in "qkvo":
        name = f"model.layers.{layer}.self_attn.{part}_proj.weight"
        yield model.inherited(name, name)


def _recurrent(model: Converted, layer: int) -> Iterator[NativeTensor]:
    """The mixer of a layer, with its projections."""
    path = f"model.layers.{layer}.mamba"
    mixer = model.structure.attention[layer].mixer
    shape, (channels, taps) = mixer.shape, mixer.conv.weight.shape
    hidden, values = shape.hidden_size, shape.query_heads * len(mixer.signs) * shape.value_size

    def made(name: str, size: tuple[int, ...], make: Callable[[], Tensor]) -> NativeTensor:
        return NativeTensor(f"{path}.{name}", size, make)

    rows = values + channels + shape.query_heads
    yield made("in_proj.weight", (rows, hidden), partial(_projections, model, layer))
    convolution = partial(model.convolution, layer)
    yield made("conv1d.weight", (channels, 1, taps), lambda: convolution("weight")[:, None])
    yield made("conv1d.bias", (channels,), partial(convolution, "bias"))
    yield model.of_mixer(f"{path}.dt_bias", layer, "dt.bias")
    yield made("A_log", (shape.query_heads,), lambda: bounded(model.mixer(layer, "A_log")))
    yield model.of_mixer(f"{path}.D", layer, "D")
    yield made("norm.weight", (values,), lambda: model.scales(layer).flatten())
    yield made("out_proj.weight", (hidden, values), lambda: model.outputs(layer).flatten(1))


def _projections(model: Converted, layer: int) -> Tensor:
    """The projections to the gate z, to x, B and C, which are values, keys and queries as sign
    pairs, and to the step."""
    signs = model.structure.attention[layer].mixer.signs
    parts = [model.mixer(layer, "output_gate.weight")]
    for part in ("v", "k", "q"):
        parts.append(signed(model.heads(layer, part).mT, signs).mT.flatten(0, 1))
    return torch.cat([*parts, model.mixer(layer, "dt.weight")])


def _idle(config: dict[str, Any], layer: int) -> Iterator[NativeTensor]:
    """An attention layer that changes nothing: the last projections of attention and MLP are 0."""
    path, hidden = f"model.layers.{layer}", config["hidden_size"]
    inner, keys = config["intermediate_size"], hidden // config["num_attention_heads"]
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "shared_mlp.input_linear": (2 * inner, hidden),
        "shared_mlp.output_linear": (hidden, inner),
    }
    for name, shape in shapes.items():
        yield constant(f"{path}.{name}.weight", shape, 0.0)
