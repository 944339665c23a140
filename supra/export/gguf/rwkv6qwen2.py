"""QRWKV in llama.cpp: architecture `rwkv6qwen2`, from the mixer `rwkv` in the form `qrwkv`.

transformers has no class of it, so the tensors come from the converted model itself. Its token
shift, which our form does not have, is written as zeros.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from supra.checkpoint.opening import Checkpoint
from supra.export.converted import Converted, Structure, common_obstacles, constant, open_converted
from supra.export.gguf.model import MLP, GgufModel, backbone
from supra.export.native import NativeTensor

MIXER, FORM = "rwkv", "qrwkv"
FORMS: tuple[tuple[str, dict[str, Any]], ...] = ((MIXER, {"form": FORM}),)
BIASES = ("q_proj.bias", "k_proj.bias", "v_proj.bias")
MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "logits_scaling")
SHIFTED = 5  # what the token shift moves: the inputs of w, k, v, r and g


def obstacles(config: PreTrainedConfig) -> list[str]:
    """What keeps a converted model out of this architecture, each with the way out; [] if it can be
    exported."""
    structure = Structure(config)
    found = list(common_obstacles(structure, MIXER, BIASES))
    if (form := structure.options(MIXER).get("form")) != FORM and MIXER in structure.layers:
        found.append(f"its rwkv has form={form}: convert with form={FORM}")
    if structure.kept:
        found.append("it keeps attention, which QRWKV has not: convert without --keep-attention")
    shape = structure.attention[0].mixer.shape
    width = shape.query_heads * shape.head_size
    if width != config.hidden_size or shape.value_size != shape.head_size:
        found.append(
            f"its heads are {width} channels wide together, and llama.cpp needs the hidden_size "
            f"(={config.hidden_size}): convert another model"
        )
    for name in MULTIPLIERS:
        if (value := getattr(config, name, 1.0)) != 1.0:
            found.append(f"its {name} is {value}, and QRWKV has none: export another form")
    return found


def gguf_model(checkpoint: Checkpoint) -> GgufModel:
    """The converted model in a checkpoint, for llama.cpp."""
    model = open_converted(checkpoint)
    # llama.cpp wants an output matrix, even where it is that of the embeddings
    head = "lm_head.weight" if model.head() else "model.embed_tokens.weight"
    tensors = [model.inherited("token_embd.weight", "model.embed_tokens.weight")]
    for layer in range(len(model.structure.layers)):
        tensors += _around(model, layer)
        tensors += _mixer(model, layer)
    tensors.append(model.inherited("output_norm.weight", "model.norm.weight"))
    tensors.append(model.inherited("output.weight", head))
    return GgufModel("rwkv6qwen2", _metadata(model), tensors)


def _metadata(model: Converted) -> dict[str, Any]:
    config, shape = model.config, model.structure.attention[0].mixer.shape
    fields = {"vocab_size", "hidden_size", "num_hidden_layers", "rms_norm_eps"}
    fields |= {"num_attention_heads", "max_position_embeddings"}
    return {
        **backbone({name: getattr(config, name) for name in fields}),
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": 0,  # there is no attention
        "attention.head_count_kv": shape.key_heads,
        "wkv.head_size": shape.head_size,
        "time_mix_extra_dim": 1,  # of the token shift; no smaller one loads
        "time_decay_extra_dim": model.structure.attention[0].mixer.decay.A.shape[1],
        "token_shift_count": 1,
    }


def _around(model: Converted, layer: int) -> Iterator[NativeTensor]:
    """The norms and the MLP of a layer."""
    path, block = f"model.layers.{layer}", f"blk.{layer}"
    names = {"input_layernorm.weight": "attn_norm.weight"}
    names |= {"post_attention_layernorm.weight": "ffn_norm.weight", **MLP}
    for old, new in names.items():
        yield model.inherited(f"{block}.{new}", f"{path}.{old}")


def _mixer(model: Converted, layer: int) -> Iterator[NativeTensor]:
    """The mixer of a layer, with its projections."""
    path, block = f"model.layers.{layer}.self_attn", f"blk.{layer}.time_mix"
    mixer = model.structure.attention[layer].mixer
    hidden, rank = mixer.decay.A.shape
    for part, name in (("q", "receptance"), ("k", "key")):
        count = mixer.shape.query_heads if part == "q" else mixer.shape.key_heads
        width = count * mixer.shape.head_size
        for kind, size in (("weight", (width, hidden)), ("bias", (width,))):
            load = partial(_projection, model, layer, part, kind)
            yield NativeTensor(f"{block}_{name}.{kind}", size, load)
    yield model.inherited(f"{block}_value.weight", f"{path}.v_proj.weight")
    if (bias := f"{path}.v_proj.bias") in model.reader.specs:
        yield model.inherited(f"{block}_value.bias", bias)
    yield model.of_mixer(f"{block}_gate.weight", layer, "output_gate.weight")
    output = partial(_output, model, layer)
    yield model.changed(f"{block}_output.weight", f"{path}.o_proj.weight", lambda _: output())

    def turned(name: str, size: tuple[int, ...], old: str) -> NativeTensor:
        return NativeTensor(f"{block}_{name}.weight", size, lambda: model.mixer(layer, old).mT)

    yield turned("decay_w1", (rank, hidden), "decay.A")
    yield turned("decay_w2", (hidden, rank), "decay.B")
    yield NativeTensor(f"{block}_decay.weight", (hidden,), partial(_decay, model, layer))
    yield constant(f"{block}_w1.weight", (SHIFTED, hidden), 0.0)
    yield constant(f"{block}_w2.weight", (SHIFTED, hidden, 1), 0.0)
    yield constant(f"{block}_lerp_x.weight", (hidden,), 0.0)
    yield constant(f"{block}_lerp_fused.weight", (SHIFTED, 1, 1, hidden), 0.0)


def _projection(model: Converted, layer: int, part: str, kind: str) -> Tensor:
    """The weight or bias of queries or keys. llama.cpp multiplies by K^-½, whatever the model's own
    factor is, so queries carry the rest."""
    attention = model.structure.attention[layer]
    name = f"model.layers.{layer}.self_attn.{part}_proj.{kind}"
    if kind == "weight":
        tensor = model.load(name)
    else:
        own = "query_bias" if part == "q" else "key_bias"
        tensor = model.mixer(layer, own).flatten()
        tensor = tensor + model.load(name) if name in model.reader.specs else tensor
    factor = attention.scaling * attention.mixer.shape.head_size**0.5
    return tensor * factor if part == "q" else tensor


def _output(model: Converted, layer: int) -> Tensor:
    """The output projection, with the factors on each head's channels. Our gate is twice theirs."""
    return 2 * (model.outputs(layer) * model.scales(layer)).flatten(1)


def _decay(model: Converted, layer: int) -> Tensor:
    return model.mixer(layer, "decay.w0").flatten()
