"""Reads the settings of `accelerate launch` from environment variables, and refuses those that
cannot work."""

import os
from pathlib import Path

from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.tracking import get_available_trackers
from accelerate.utils import GradientAccumulationPlugin

from supra.errors import UserError, check_choice
from supra.uptrain.config import UptrainConfig
from supra.uptrain.stage_settings import LAYERWISE

# setting in accelerate's parallelism_config -> why it cannot work
UNSPLITTABLE = {
    "tp_size": "tensor parallelism splits projections that a mixer needs whole, so gradients would "
    "be wrong",
    "cp_size": "context parallelism splits sequences, and no state would pass between their parts",
    "sp_size": "sequence parallelism splits sequences, and no state would pass between their parts",
}
INSTEAD = "use FSDP version 2 to shard the model, as recipes/launch/fsdp.yaml does"
# the kinds of parallelism that tests cover; MULTI_CPU and MULTI_GPU are DDP
SUPPORTED = {
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.FSDP,
}


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
    check_kind(accelerator.distributed_type)
    return accelerator


def check_kind(kind: DistributedType) -> None:
    """Raise UserError for a kind of parallelism that accelerate chose by the launcher's settings
    and the machine, and that the run does not support."""
    if kind not in SUPPORTED:
        raise UserError(
            f"distributed_type (={kind.value}) is not supported, because it was never tested: run "
            "in one process, or on GPUs with recipes/launch/ddp.yaml or fsdp.yaml"
        )
    if _asked("ACCELERATE_USE_FSDP") and kind != DistributedType.FSDP:
        raise UserError(
            f"distributed_type (=FSDP) would be {kind.value} here and shard nothing: accelerate "
            "has FSDP only for processes with GPUs; on CPUs use recipes/launch/ddp.yaml"
        )


def check_launch(config: UptrainConfig) -> None:
    """Raise UserError for settings of the launcher that would train wrongly, crash, or have no
    effect."""
    _check_trainer()
    if _asked("ACCELERATE_USE_PARALLELISM_CONFIG"):
        _check_mesh()
    if _asked("ACCELERATE_USE_FSDP"):
        _check_fsdp(config)
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", config.precision):
        raise UserError(
            f"mixed_precision (={precision}) has no effect, because the run's own precision "
            f"(={config.precision}) decides: set mixed_precision to no"
        )
    compiler = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "NO")
    if compiler.upper() != "NO":
        raise UserError(
            f"dynamo_backend (={compiler}) is not supported, because it was never tested: set it "
            "to no"
        )


def _check_trainer() -> None:
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


def _check_mesh() -> None:
    for name, reason in UNSPLITTABLE.items():
        if (size := _size(name)) != 1:
            raise UserError(f"parallelism_config_{name} (={size}) must be 1: {reason}; {INSTEAD}")
    copies, shards = _size("dp_replicate_size"), _size("dp_shard_size")
    sizes = (
        f"parallelism_config_dp_replicate_size (={copies}) and parallelism_config_dp_shard_size "
        f"(={shards})"
    )
    if not _asked("ACCELERATE_USE_FSDP"):
        if copies != 1 or shards != 1:
            raise UserError(
                f"{sizes} need FSDP: add the fsdp_config of recipes/launch/fsdp.yaml, or leave "
                "parallelism_config out for a copy of the model on each process"
            )
        return
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if shards < 2 or copies * shards != processes:
        raise UserError(
            f"{sizes} must be copies of the model and parts of each copy: two parts or more, and "
            f"copies x parts must be the number of processes (={processes}); or leave "
            "parallelism_config out, and each process has a part of one copy"
        )


def fsdp_plugin() -> FullyShardedDataParallelPlugin | None:
    """The launcher's FSDP settings without memory-efficient loading: accelerate's fails to
    distribute the mixers' buffers. spread.py loads weights and buffers in the first process only.
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
    if names := [name for name in config.stages if name in LAYERWISE]:
        _check_units(" and ".join(names))


def _check_units(stages: str) -> None:
    """Raise UserError if attention modules would be no units of their own, as these stages need."""
    if _asked("FSDP_ACTIVATION_CHECKPOINTING"):
        raise UserError(
            f"fsdp_activation_checkpointing (=true) would wrap the attention modules that {stages} "
            "trains one by one: set it to false, and gradient_checkpointing of the run to true"
        )
    policy = os.environ.get("FSDP_AUTO_WRAP_POLICY", "NO_WRAP").upper()
    if policy != "TRANSFORMER_BASED_WRAP":
        raise UserError(
            f"fsdp_auto_wrap_policy (={policy}) must be TRANSFORMER_BASED_WRAP, because {stages} "
            "needs each attention module as a unit of its own"
        )
    if classes := os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP"):
        raise UserError(
            f"fsdp_transformer_layer_cls_to_wrap (={classes}) must be left out, because {stages} "
            "needs each attention module as a unit of its own"
        )


def _size(name: str) -> int:
    """A size in accelerate's parallelism_config."""
    return int(os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}", "1"))


def _asked(variable: str) -> bool:
    return os.environ.get(variable, "").lower() == "true"
