"""Reads the settings of `accelerate launch` from environment variables, and refuses those that
cannot work."""

import os
from pathlib import Path

from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.tracking import get_available_trackers
from accelerate.utils import GradientAccumulationPlugin

from supra.errors import UserError, check_choice
from supra.uptrain.config import LAYERWISE, UptrainConfig

# setting in accelerate's parallelism_config -> why it cannot work
UNSPLITTABLE = {
    "tp_size": "tensor parallelism splits projections that a mixer needs whole, so gradients would "
    "be wrong",
    "cp_size": "context parallelism splits sequences, and no state would pass between their parts",
    "sp_size": "sequence parallelism splits sequences, and no state would pass between their parts",
}
INSTEAD = "use FSDP version 2 to shard the model, as recipes/launch/fsdp.yaml does"


def open_accelerator(config: UptrainConfig, folder: Path) -> Accelerator:
    """The accelerator for a run in `folder`. Raises UserError for a setup that the run's stages do
    not support."""
    check_launch(config)
    available = get_available_trackers()
    for name in config.trackers:
        check_choice("installed tracker", name, [str(tracker) for tracker in available])
    accelerator = Accelerator(
        mixed_precision="no",  # see processes.autocast
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # see Run.train_step
        log_with=list(config.trackers) or None,
        project_dir=folder,
        fsdp_plugin=fsdp_plugin(),
    )
    names = [name for name in config.stages if name in LAYERWISE]
    if names and accelerator.distributed_type == DistributedType.FSDP:
        raise UserError(
            f"{' and '.join(names)} cannot run under FSDP, where no process has a whole layer: "
            "first run them separately (in one process, or with recipes/launch/ddp.yaml), then "
            "this run with the result as student"
        )
    return accelerator


def check_launch(config: UptrainConfig) -> None:
    """Raise UserError for a kind of parallelism that would train wrongly or crash."""
    if _asked("ACCELERATE_USE_DEEPSPEED"):
        file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "by default")
        what = f"config {file}" if file else f"ZeRO stage {stage}"
        raise UserError(
            f"distributed_type (=DEEPSPEED, {what}) is not supported: a run reads gradients and "
            f"weights, which DeepSpeed hides; {INSTEAD}"
        )
    if _asked("ACCELERATE_USE_MEGATRON_LM"):
        raise UserError(
            "distributed_type (=MEGATRON_LM) is not supported: Megatron-LM only trains its own "
            f"models; {INSTEAD}"
        )
    if _asked("ACCELERATE_USE_PARALLELISM_CONFIG"):
        for name, reason in UNSPLITTABLE.items():
            size = os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}", "1")
            if size != "1":
                raise UserError(
                    f"parallelism_config_{name} (={size}) must be 1: {reason}; {INSTEAD}"
                )
    if _asked("ACCELERATE_USE_FSDP"):
        _check_fsdp(config)


def fsdp_plugin() -> FullyShardedDataParallelPlugin | None:
    """The launcher's FSDP settings without memory-efficient loading.

    Memory-efficient loading loads weights in the first process only. Here every process calibrates
    and evaluates the whole student, and accelerate fails to distribute the mixers' buffers.
    """
    if not _asked("ACCELERATE_USE_FSDP"):
        return None
    return FullyShardedDataParallelPlugin(cpu_ram_efficient_loading=False)


def _check_fsdp(config: UptrainConfig) -> None:
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise UserError(
            f"fsdp_version (={version}) must be 2: version 1 hides the head's weights while the "
            "model runs, so that they would get no gradient"
        )
    if config.extend is not None and _asked("FSDP_ACTIVATION_CHECKPOINTING"):
        raise UserError(
            "fsdp_activation_checkpointing (=true) computes layers again, and in the stage extend "
            "their initial states would be lost: set it to false"
        )


def _asked(variable: str) -> bool:
    return os.environ.get(variable, "").lower() == "true"
