"""The architectures that converted models can be exported to."""

from types import ModuleType

from transformers import PreTrainedConfig

from supra.checkpoint.opening import Checkpoint
from supra.errors import UserError
from supra.export import granite, qwen3_5
from supra.export.converted import KEPT
from supra.export.gguf import target as gguf

# Each has FORMS, the mixers and options that it can hold; obstacles(); and native_model().
FOLDERS: dict[str, ModuleType] = {"qwen3_5": qwen3_5, "granite": granite}
# gguf has gguf_model() in its place
TARGETS = FOLDERS | {"gguf": gguf}


def check_exportable(checkpoint: Checkpoint, config: PreTrainedConfig, target: str) -> None:
    """Raise UserError, with every obstacle in one line, unless the model can be exported."""
    if config.model_type != "supra":
        raise UserError(
            f"model {checkpoint.name!r} is not converted: run supra convert --export-ready {target}"
        )
    found = TARGETS[target].obstacles(config)
    if (checkpoint.folder / "adapter_config.json").exists():
        found.append("its folder holds an adapter: merge it with peft's merge_and_unload()")
    if found:
        raise UserError(
            f"model {checkpoint.name!r} cannot be exported to {target}: {'; '.join(found)}"
        )


def check_idle_attention(config: PreTrainedConfig, target: str, idle_attention: bool) -> None:
    """Raise UserError unless `idle_attention` fits: engines expect an attention layer."""
    keeps = KEPT in config.supra["layers"]
    if not keeps and not idle_attention:
        raise UserError(
            f"all layers are recurrent, and engines run {target} only with an attention layer: "
            "give --idle-attention, which appends one that changes nothing, or convert with "
            "--keep-attention"
        )
    if keeps and idle_attention:
        raise UserError("--idle-attention is for models without attention layers: leave it out")
