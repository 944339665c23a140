"""The target `gguf`: a converted model in whichever architecture of llama.cpp holds its mixer."""

from typing import Any

from transformers import PreTrainedConfig

from supra.checkpoint.opening import Checkpoint
from supra.export import granite, qwen3_5
from supra.export.converted import KEPT, Structure
from supra.export.gguf import granitehybrid, qwen35, rwkv6qwen2
from supra.export.gguf.model import GgufModel
from supra.export.native import NativeModel

FORMS: tuple[tuple[str, dict[str, Any]], ...] = (
    *qwen3_5.FORMS,
    *granite.FORMS,
    *rwkv6qwen2.FORMS,
)
# of the mixers that go through an architecture of transformers
_NATIVE = {qwen3_5.MIXER: (qwen3_5, qwen35), granite.MIXER: (granite, granitehybrid)}


def obstacles(config: PreTrainedConfig) -> list[str]:
    """What keeps a converted model out of llama.cpp, each with the way out; [] if it can be
    exported."""
    mixer = _mixer(config)
    if mixer == rwkv6qwen2.MIXER:
        return rwkv6qwen2.obstacles(config)
    if mixer not in _NATIVE:
        names = [" ".join([name, *(f"{k}={v}" for k, v in x.items())]) for name, x in FORMS]
        return [f"its layers are {mixer}: convert with --mixer {', or '.join(names)}"]
    source, _ = _NATIVE[mixer]
    return source.obstacles(config) or _own_obstacles(config, mixer)


def _own_obstacles(config: PreTrainedConfig, mixer: str) -> list[str]:
    """What transformers' architecture can hold and llama.cpp's cannot."""
    structure = Structure(config)
    kind = config.rope_parameters.get("rope_type", "default")
    held = ("default", "linear", "llama3") if mixer == granite.MIXER else ("default",)
    if structure.kept and kind not in held:
        return [
            f"its kept layers have rope_type {kind}, which llama.cpp does not have there: convert "
            "without --keep-attention"
        ]
    if mixer != granite.MIXER:
        return []
    recurrent = structure.attention[structure.recurrent[0]].mixer
    inner = recurrent.shape.query_heads * len(recurrent.signs) * recurrent.shape.value_size
    return granitehybrid.width_obstacles(inner, config.hidden_size)


def needs_attention(config: PreTrainedConfig) -> bool:
    """Whether llama.cpp runs the architecture only with an attention layer."""
    return _mixer(config) != rwkv6qwen2.MIXER


def gguf_model(
    checkpoint: Checkpoint, idle_attention: bool = False
) -> tuple[GgufModel, NativeModel | None]:
    """The converted model in a checkpoint for llama.cpp, and, if it goes through an architecture of
    transformers, as that one.

    idle_attention: append an attention layer whose output is 0.
    """
    mixer = _mixer(checkpoint.config())
    if mixer == rwkv6qwen2.MIXER:
        return rwkv6qwen2.gguf_model(checkpoint), None
    source, architecture = _NATIVE[mixer]
    native = source.native_model(checkpoint, idle_attention)
    if idle_attention:  # positions change nothing there, and not every scaling of them loads
        native.config["rope_parameters"]["rope_type"] = "default"
    return architecture.gguf_model(native), native


def _mixer(config: PreTrainedConfig) -> str:
    """The mixer of its recurrent layers, or their mixers."""
    return " and ".join(sorted({*config.supra["layers"]} - {KEPT})) or KEPT
