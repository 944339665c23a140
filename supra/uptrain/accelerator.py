"""Reads what `accelerate launch` sets in environment variables, and refuses what cannot work."""

import os
from pathlib import Path

from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.tracking import get_available_trackers
from accelerate.utils import GradientAccumulationPlugin

from supra.errors import UserError, check_choice
from supra.uptrain.config import LAYERWISE, UptrainConfig

# setting in accelerate's parallelism_config -> why it cannot work
UNSPLITTABLE = {
    "tp_size": "tensor parallelism splits projections that a mixer needs whole, and gradients "
    "come out wrong",
    "cp_size": "context parallelism cuts sequences, and their parts would not pass a state on",
    "sp_size": "sequence parallelism cuts sequences, and their parts would not pass a state on",
}
INSTEAD = "spread the model by FSDP of version 2, as recipes/launch/fsdp.yaml does"


def open_accelerator(config: UptrainConfig, folder: Path) -> Accelerator:
    """accelerate's view of the processes, for a run in `folder`. Raises UserError for a setup that
    the run's stages do not support."""
    check_launch(config)
    available = get_available_trackers()
    for name in config.trackers:
        check_choice("installed tracker", name, [str(tracker) for tracker in available])
    accelerator = Accelerator(
        mixed_precision="no",  # see Run._autocast
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # see Run.train_step
        log_with=list(config.trackers) or None,
        project_dir=folder,
        fsdp_plugin=fsdp_plugin(),
    )
    names = [name for name in config.stages if name in LAYERWISE]
    if names and accelerator.distributed_type == DistributedType.FSDP:
        raise UserError(
            f"{' and '.join(names)} cannot run under FSDP, where no process has a whole layer: run "
            "them in a run of their own (one process, or recipes/launch/ddp.yaml), and this one "
            "with the result as student"
        )
    return accelerator


def check_launch(config: UptrainConfig) -> None:
    """Raise UserError for a kind of parallelism that would train wrongly or crash."""
    if _asked("ACCELERATE_USE_DEEPSPEED"):
        file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "of its own default")
        what = f"config {file}" if file else f"ZeRO stage {stage}"
        raise UserError(
            f"distributed_type (=DEEPSPEED, {what}) does not work here: a run reads gradients and "
            f"weights, which DeepSpeed hides; {INSTEAD}"
        )
    if _asked("ACCELERATE_USE_MEGATRON_LM"):
        raise UserError(
            "distributed_type (=MEGATRON_LM) does not work here: Megatron-LM trains only its own "
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

    That would load weights in the first process only. Here every process calibrates and evaluates
    the whole student, and accelerate fails on the mixers' buffers when it distributes them.
    """
    if not _asked("ACCELERATE_USE_FSDP"):
        return None
    return FullyShardedDataParallelPlugin(cpu_ram_efficient_loading=False)


def _check_fsdp(config: UptrainConfig) -> None:
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise UserError(
            f"fsdp_version (={version}) must be 2: version 1 hides the head's weights while the "
            "model runs, and they would get no gradient"
        )
    if config.extend is not None and _asked("FSDP_ACTIVATION_CHECKPOINTING"):
        raise UserError(
            "fsdp_activation_checkpointing (=true) computes layers again, and those of the stage "
            "extend would start from a state that is gone: set it to false"
        )


def _asked(variable: str) -> bool:
    return os.environ.get(variable, "").lower() == "true"
