"""A converted checkpoint that is rewritten: its tensors by name, and what all targets ask of it."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from supra.checkpoint.config_rules import meta_model
from supra.checkpoint.opening import Checkpoint
from supra.checkpoint.weights import FolderReader, ModuleReader, tied_names
from supra.export.native import NativeModel, NativeTensor
from supra.mixers.gates import MAX_EXPONENT
from supra.model.attention import attention_modules

# Families whose layers are x + attention(norm(x)), then x + MLP(norm(x)), with RMSNorm and a gated
# MLP, under Llama's names. tests/export/test_families.py shows that the export of each is exact.
FAMILIES = (
    "cwm", "granite", "internlm3", "iquestcoder", "llama", "ministral", "mistral", "qwen2", "qwen3",
    "seed_oss", "smollm3",
)  # fmt: skip
# Rotary scalings that do not depend on the length of the text that is read.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
# Fields of Granite's models. Others lack them, and compute as if they were 1.
MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "logits_scaling")
KEPT = "softmax"


class Structure:
    """What a converted model's config says: the model on the meta device, without weights."""

    def __init__(self, config: PreTrainedConfig):
        self.config = config
        self.model = meta_model(config)
        self.layers: list[str] = config.supra["layers"]
        self.attention: dict[int, nn.Module] = {
            module.layer_idx: module for module in attention_modules(self.model)
        }

    @property
    def kept(self) -> list[int]:
        """The layers that keep softmax attention."""
        return [layer for layer, name in enumerate(self.layers) if name == KEPT]

    @property
    def recurrent(self) -> list[int]:
        """The layers with a recurrent mixer."""
        return [layer for layer, name in enumerate(self.layers) if name != KEPT]

    def rotates(self, layer: int) -> bool:
        """Whether a layer's mixer rotates queries and keys to their positions."""
        attention = self.attention[layer]
        return attention.rotates and attention.mixer.rotates

    def options(self, mixer: str) -> dict[str, Any]:
        """The options of a mixer of the model; {} if no layer has it."""
        return self.config.supra["options"].get(mixer) or {}


@dataclass(frozen=True)
class Converted:
    """A structure with the tensors of its checkpoint, which are read one at a time."""

    structure: Structure
    reader: FolderReader | ModuleReader

    @property
    def config(self) -> PreTrainedConfig:
        return self.structure.config

    def load(self, name: str) -> Tensor:
        """A tensor in float32, for computing."""
        return self.reader.load(name).float()

    def inherited(self, new: str, old: str) -> NativeTensor:
        """A tensor under its new name, otherwise as it is."""
        shape = self.reader.specs[old].shape
        return NativeTensor(new, shape, lambda: self.reader.load(old))

    def changed(self, new: str, old: str, change: Callable[[Tensor], Tensor]) -> NativeTensor:
        """A tensor of the same shape, with other values."""
        return NativeTensor(new, self.reader.specs[old].shape, lambda: change(self.load(old)))

    def mixer(self, layer: int, name: str) -> Tensor:
        """A tensor of a layer's mixer, in float32."""
        return self.load(f"model.layers.{layer}.self_attn.mixer.{name}")

    def of_mixer(self, new: str, layer: int, name: str) -> NativeTensor:
        """A tensor of a layer's mixer under its new name, otherwise as it is."""
        return self.inherited(new, f"model.layers.{layer}.self_attn.mixer.{name}")

    def heads(self, layer: int, part: str) -> Tensor:
        """A projection to queries, keys or values, once for every query head: [Hq, K, D].

        It includes what is left of a norm of queries or keys in a recurrent layer: its weight, over
        the norm of ones (supra/model/qk_norm.py).
        """
        shape = self.structure.attention[layer].mixer.shape
        path = f"model.layers.{layer}.self_attn.{part}"
        count = shape.query_heads if part == "q" else shape.key_heads
        weight = self.load(f"{path}_proj.weight").unflatten(0, (count, -1))
        if f"{path}_norm.weight" in self.reader.specs:
            factors = self.load(f"{path}_norm.weight") / (1 + self.config.rms_norm_eps) ** 0.5
            weight = weight * factors[:, None]
        return weight.repeat_interleave(shape.query_heads // count, dim=0)

    def convolution(self, layer: int, part: str) -> Tensor:
        """The "weight" [C, W] or "bias" [C] of a layer's convolution, times its gain."""
        tensor = self.mixer(layer, f"conv.{part}")
        if self.structure.attention[layer].mixer.conv.gain is None:
            return tensor
        gain = self.mixer(layer, "conv.gain")
        return tensor * gain.view(-1, *[1] * (tensor.dim() - 1))

    def outputs(self, layer: int) -> Tensor:
        """The output projection, once for every block of a head's channels: [D, Hq, P, V]."""
        mixer = self.structure.attention[layer].mixer
        weight = self.load(f"model.layers.{layer}.self_attn.o_proj.weight")
        weight = weight.unflatten(1, (mixer.shape.query_heads, 1, -1))
        return weight.expand(-1, -1, len(mixer.signs), -1)

    def scales(self, layer: int) -> Tensor:
        """The mixer's factors on each head's channels: [Hq, P, V]."""
        mixer = self.structure.attention[layer].mixer
        scale = self.mixer(layer, "scale") * self.mixer(layer, "magnitude")
        return scale.unflatten(1, (len(mixer.signs), -1))

    def head(self) -> list[NativeTensor]:
        """The output embeddings; none if they are the input embeddings."""
        name = "lm_head.weight"
        tied = name in tied_names(self.structure.model)
        return [] if tied else [self.inherited(name, name)]


# What a target makes of one layer: its tensors, by the layer's number.
LayerTensors = Callable[[Converted, int], Iterator[NativeTensor]]


def open_converted(checkpoint: Checkpoint) -> Converted:
    """The converted model in a checkpoint."""
    config = checkpoint.config()
    return Converted(Structure(config), checkpoint.tensors(config))


def rewritten(
    checkpoint: Checkpoint,
    idle_attention: bool,
    *,
    config: Callable[[Structure, bool], dict[str, Any]],
    kept: LayerTensors,
    recurrent: LayerTensors,
    around: LayerTensors,
    final_norm: Callable[[Converted, str], NativeTensor],
    idle: Callable[[dict[str, Any], int], Iterator[NativeTensor]],
) -> NativeModel:
    """The converted model in a checkpoint, put together from what a target makes of its parts.

    kept, recurrent: what replaces the attention of such a layer. around: its norms and its MLP.
    idle: with `idle_attention`, one more layer whose output is 0.
    """
    model = open_converted(checkpoint)
    tensors = [model.inherited("model.embed_tokens.weight", "model.embed_tokens.weight")]
    for layer, mixer in enumerate(model.structure.layers):
        tensors += kept(model, layer) if mixer == KEPT else recurrent(model, layer)
        tensors += around(model, layer)
    fields = config(model.structure, idle_attention)
    if idle_attention:
        tensors += idle(fields, len(model.structure.layers))
    tensors.append(final_norm(model, "model.norm.weight"))
    return NativeModel(fields, [*tensors, *model.head()])


def bounded(logarithm: Tensor) -> Tensor:
    """The logarithm of what `bounded_exp` returns."""
    return logarithm.clamp(max=MAX_EXPONENT)


def constant(name: str, shape: tuple[int, ...], value: float) -> NativeTensor:
    """A tensor with one value everywhere."""
    return NativeTensor(name, shape, lambda: torch.full(shape, value))


def common_fields(config: PreTrainedConfig, layers: int) -> dict[str, Any]:
    """The fields of config.json that have the same meaning in all architectures."""
    names = (
        "vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "hidden_act",
        "max_position_embeddings", "initializer_range", "rms_norm_eps", "tie_word_embeddings",
        "bos_token_id", "eos_token_id", "pad_token_id",
    )  # fmt: skip
    fields = {name: getattr(config, name) for name in names}
    return fields | {
        "num_hidden_layers": layers,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        "rope_parameters": dict(config.rope_parameters),
        "dtype": str(config.dtype).removeprefix("torch."),
    }


def common_obstacles(
    structure: Structure, mixer: str, biases: tuple[str, ...] = ()
) -> Iterator[str]:
    """What keeps a model out of every target whose recurrent layers are `mixer`.

    biases: how the names of biases end that the target can hold.
    """
    config = structure.config
    if config.base_model_type not in FAMILIES:
        yield (
            f"the layers of {config.base_model_type} are not those of Llama: convert a model of "
            f"{', '.join(FAMILIES[:-1])} or {FAMILIES[-1]}"
        )
        return
    if others := sorted({structure.layers[layer] for layer in structure.recurrent} - {mixer}):
        yield f"its layers are {' and '.join(others)}: convert with --mixer {mixer}"
    if not structure.recurrent:
        yield f"all its layers keep softmax attention: convert with --mixer {mixer}"
    taps = structure.options(mixer).get("conv_size", 4)
    if not 2 <= taps <= 4:  # of the kernels causal_conv1d, which most engines use
        yield f"its conv_size is {taps}, and engines have 2 to 4 taps: convert with conv_size=4"
    if config.hidden_act != "silu":
        yield f"its hidden_act is {config.hidden_act}, not silu: convert another model"
    names = filter(_is_bias, structure.model.state_dict())
    if others := [name for name in names if not name.endswith(biases)]:
        yield f"it has biases ({others[0]}): convert a model without, such as a Llama or a Qwen3"
    attentions = [structure.attention[layer] for layer in structure.recurrent]
    if [x for x in attentions if hasattr(x, "q_norm") and not x.mixer.drops_qk_norm]:
        yield (
            f"its queries and keys have norms, which {mixer} keeps: convert a model without, such "
            "as a Llama"
        )
    if config.state_policy is not None:
        yield "a state_policy bounds its states: remove state_policy from its config.json"
    yield from _kept_obstacles(structure)


def _is_bias(name: str) -> bool:
    return name.endswith(".bias") and ".mixer." not in name


def _kept_obstacles(structure: Structure) -> Iterator[str]:
    """What a kept layer has that no target can hold."""
    config = structure.config
    windows = {layer: _window(structure.attention[layer], config) for layer in structure.kept}
    if windowed := [layer for layer, window in windows.items() if window is not None]:
        yield (
            f"layer {windowed[0]} keeps attention within a sliding window of "
            f"{windows[windowed[0]]} tokens: convert with --keep-attention of layers without one"
        )
    kind = config.rope_parameters.get("rope_type", "default")
    if structure.kept and kind not in ROPE_TYPES:
        yield (
            f"its kept layers have rope_type {kind}, which depends on the text's length: convert "
            "without --keep-attention"
        )


def _window(attention: nn.Module, config: PreTrainedConfig) -> int | None:
    """The sliding window of an attention module. Some families keep it in the module, where None
    means that this layer has none, and others in the config alone."""
    return getattr(attention, "sliding_window", getattr(config, "sliding_window", None))


def cache_bytes(key_heads: int, head_size: int, itemsize: int) -> int:
    """Bytes of one attention layer's key-value cache for one token."""
    return 2 * math.prod((key_heads, head_size, itemsize))
