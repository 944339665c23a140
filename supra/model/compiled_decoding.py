"""Decoding with a compiled step, for converted models and others of transformers."""

from typing import Any

from transformers import CompileConfig, PreTrainedModel

from supra.errors import UserError


def compiled_decoding(backend: str = "inductor") -> dict[str, Any]:
    """Arguments of `generate` that compile the step of one token, also on a CPU, where transformers
    compiles nothing by itself. The prompt is read as it is."""
    config = CompileConfig(backend=backend)
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


def check_compilable(model: PreTrainedModel, name: str) -> None:
    """Raise UserError, which names the option, for a model whose step `generate` cannot compile."""
    if model._is_stateful:
        raise UserError(
            f"{name}: {model.config.model_type!r} keeps its states in a cache that transformers "
            f"does not compile: leave {name} out"
        )
    devices = {str(device) for device in getattr(model, "hf_device_map", {}).values()}
    if len(devices) > 1 and devices & {"cpu", "disk"}:
        raise UserError(
            f"{name}: weights on {', '.join(sorted(devices))} are moved for every token, which "
            f"cannot be compiled: leave {name} or --device-map out"
        )
