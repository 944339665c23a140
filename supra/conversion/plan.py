"""The plan of a conversion: each layer's mixer, and what becomes of every tensor."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from supra.checkpoint.config_rules import meta_model
from supra.checkpoint.conversion_report import TensorFate
from supra.checkpoint.weights import (
    FolderReader,
    ModuleReader,
    TensorSpec,
    check_fits,
    tied_names,
)
from supra.errors import UserError, check_choice
from supra.mixers import NEW_PARAMETERS
from supra.model.attention import SupraAttention, attention_modules
from supra.model.auto import converted_config
from supra.model.families import FAMILIES, refusal
from supra.model.qk_norm import qk_norms


class Plan(NamedTuple):
    """A planned conversion; no tensor has been read yet."""

    reader: FolderReader | ModuleReader
    config: PreTrainedConfig
    student: PreTrainedModel  # on the meta device
    fates: list[TensorFate]

    @property
    def written(self) -> dict[str, TensorSpec]:
        """The tensors of the converted model, in the order in which they are made."""
        kept = [fate for fate in self.fates if fate.fate != "dropped"]
        return {x.name: TensorSpec(x.shape, getattr(torch, x.dtype)) for x in kept}


def plan_conversion(
    reader: FolderReader | ModuleReader,
    base: PreTrainedConfig,
    layers: list[str],
    options: dict[str, dict[str, Any]],
    dtype: torch.dtype | None,
) -> Plan:
    """The plan for `layers`, the mixer of each layer. Raises UserError as `plan_tensors` does."""
    config = converted_config(base, layers, options)
    student = meta_model(config)
    fates = plan_tensors(reader, student, dtype)
    config.dtype = dtype or main_dtype(reader.specs)
    return Plan(reader, config, student, fates)


def check_family(config: PreTrainedConfig) -> None:
    """Raise UserError unless the config is of a family that converts."""
    if config.model_type == "supra":
        raise UserError("the model is already converted: convert the original model instead")
    if config.model_type not in FAMILIES:
        raise UserError(refusal(config.model_type))
    if getattr(config, "quantization_config", None) is not None and not is_gguf(config):
        raise UserError("a quantised checkpoint cannot be converted: use the original weights")


def is_gguf(config: PreTrainedConfig) -> bool:
    """Whether the config came from a GGUF file, whose blocks are unpacked when they are read."""
    method = getattr(config.quantization_config, "quant_method", None)
    return "gguf" in str(method).lower()


def plan_layers(count: int, mixer: str, keep_attention: Iterable[int]) -> list[str]:
    """The mixer of each of `count` layers."""
    layers = [mixer] * count
    for layer in keep_attention:
        if not -count <= layer < count:
            raise UserError(
                f"keep_attention names layer {layer}: the model has layers 0 to {count - 1}"
            )
        layers[layer] = "softmax"
    return layers


def check_positions(attention_positions: str, config: PreTrainedConfig, kept: bool) -> str:
    """The positions of the layers that keep attention, "rope" or "none".

    kept: whether a layer keeps attention. Raises UserError for "none" where no layer does, or where
    the family's attention has no rotation that it could do without.
    """
    check_choice("attention_positions", attention_positions, ("rope", "none"))
    if attention_positions == "rope":
        return attention_positions
    if not kept:
        raise UserError(
            "attention_positions (='none') is for layers that keep attention, and no layer does: "
            "give keep_attention, or the mixer option rotary=false for recurrent layers"
        )
    kept_alone = converted_config(config, ["softmax"] * config.num_hidden_layers, {})
    if not any(attention.rotates for attention in attention_modules(meta_model(kept_alone))):
        raise UserError(
            f"attention_positions (='none'): attention of model_type {config.model_type!r} has no "
            "rotary positions that can be left out: leave attention_positions out"
        )
    return attention_positions


def plan_tensors(
    reader: FolderReader | ModuleReader, student: PreTrainedModel, dtype: torch.dtype | None
) -> list[TensorFate]:
    """What becomes of every tensor of the old checkpoint, and which new tensors are added.

    Raises UserError when a tensor is missing, or when its shape differs from the config's.
    """
    wanted = student.state_dict()
    tied = tied_names(student)
    float32 = student._keep_in_fp32_modules_strict  # parts of names, such as a router's bias
    undivided = _undivided_norms(student)
    fates = {}
    for name, spec in reader.specs.items():
        fate, note, kept = "copied", undivided.get(name, ""), spec.dtype
        if name in wanted and name not in tied:
            check_fits(name, spec, wanted[name])
        if name not in wanted:
            fate, note = "dropped", "not a parameter of the model"
        elif name in tied:
            if not torch.equal(reader.load(name), reader.load(tied[name])):
                raise UserError(
                    f"{name} differs from {tied[name]}, to which the config ties it: "
                    "set tie_word_embeddings to false in its config.json"
                )
            fate, note = "dropped", f"tied to {tied[name]}"
        elif (
            dtype not in (None, spec.dtype)
            and spec.dtype.is_floating_point
            and not any(part in name for part in float32)
        ):
            fate, note, kept = "transformed", f"cast from {short_name(spec.dtype)}", dtype
        elif name != reader.sources[name]:
            fate, note = "transformed", f"renamed from {reader.sources[name]}"
        fates[name] = TensorFate(name, fate, spec.shape, short_name(kept), note)
    known = {*fates, *tied}
    missing = [name for name in wanted if name not in known and NEW_PARAMETERS not in name]
    if missing:
        raise UserError(
            f"{len(missing)} tensors are missing from the checkpoint, first {missing[0]}: the "
            "download is incomplete, or weights and config do not belong together"
        )
    for name, tensor in wanted.items():
        if NEW_PARAMETERS in name:
            fates[name] = TensorFate(name, "new", tuple(tensor.shape), "float32")
    return list(fates.values())


def _undivided_norms(student: PreTrainedModel) -> dict[str, str]:
    """A note for each weight of a QK-norm that does no more than multiply."""
    return {
        f"{module_name}.{norm_name}.weight": f"without its norm: {module.mixer.name} has its own"
        for module_name, module in student.named_modules()
        if isinstance(module, SupraAttention) and module.mixer.drops_qk_norm
        for norm_name, _ in qk_norms(module)
    }


def main_dtype(specs: dict[str, TensorSpec]) -> torch.dtype:
    """The dtype that takes up most of the bytes."""
    sizes: dict[torch.dtype, int] = {}
    for spec in specs.values():
        sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.nbytes
    return max(sizes, key=sizes.__getitem__)


def short_name(dtype: torch.dtype) -> str:
    """`bfloat16` of torch.bfloat16."""
    return str(dtype).removeprefix("torch.")
