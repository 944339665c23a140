"""A model as an architecture of llama.cpp names and shapes it, and what these have in common."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from supra.errors import UserError
from supra.export.native import NativeModel, NativeTensor

# what is named alike in transformers and, by other names, in llama.cpp
OUTSIDE = {
    "embed_tokens.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
ATTENTION = {
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
}
MLP = {
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
_LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class GgufModel:
    """`metadata` holds the architecture's fields without its name in front; `tensors` have
    llama.cpp's names, and the shapes of torch."""

    architecture: str
    metadata: dict[str, Any]
    tensors: list[NativeTensor]

    @property
    def layers(self) -> int:
        return self.metadata["block_count"]

    @property
    def vocabulary_size(self) -> int:
        return self.metadata["vocab_size"]


def renamed(name: str, inside: Mapping[str, str]) -> str:
    """llama.cpp's name of a tensor of transformers; `inside` names those of a layer."""
    if found := _LAYER.fullmatch(name):
        return f"blk.{found[1]}.{inside[found[2]]}"
    known = name if name in OUTSIDE else name.rpartition("model.")[2]
    return OUTSIDE[known]


def changed(
    tensor: NativeTensor, name: str, change: Callable[[Tensor], Tensor], shape: Iterable[int]
) -> NativeTensor:
    """The tensor under another name, as `change` makes it when it is read."""
    return NativeTensor(name, tuple(shape), lambda: change(tensor.load()))


def backbone(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that every architecture has, from a config.json's."""
    return {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "attention.head_count": config["num_attention_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "vocab_size": config["vocab_size"],
    }


def rope_base(config: Mapping[str, Any]) -> float:
    """The base of rotary positions."""
    return float(config["rope_parameters"]["rope_theta"])


def rope_factors(config: Mapping[str, Any]) -> list[NativeTensor]:
    """How many times as long as by `rope_base` every rotary pair takes for a turn, as a tensor that
    llama.cpp reads; none if positions are not scaled.

    Raises UserError for a scaling that changes more than that.
    """
    kind = config["rope_parameters"].get("rope_type", "default")
    if kind == "default":
        return []
    made = AutoConfig.for_model(**config)
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](made, "cpu")
    if factor != 1 or kind in ("dynamic", "longrope"):
        raise UserError(f"rotary positions of rope_type (={kind!r}) are not written to GGUF")
    pairs = torch.arange(len(frequencies)) / len(frequencies)
    factors = rope_base(config) ** -pairs / frequencies
    return [NativeTensor("rope_freqs.weight", tuple(factors.shape), lambda: factors)]


def interleave_pairs(heads: int, weight: Tensor) -> Tensor:
    """Rows of a query or key projection in the order of rotary pairs that llama.cpp has for Llama
    and Granite: the two channels of a pair are neighbours, and not half a head apart as in
    transformers. A bias has rows too."""
    pairs = weight.unflatten(0, (heads, 2, -1))
    return pairs.transpose(1, 2).reshape(weight.shape)


def text_config(model: NativeModel) -> dict[str, Any]:
    """The config of the language model in it."""
    return model.config.get("text_config", model.config)
