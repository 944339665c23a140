"""Reads the settings of `accelerate launch` from environment variables, and refuses those that
cannot work."""

import os
from pathlib import Path

from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.parallelism_config import ParallelismConfig
from accelerate.tracking import get_available_trackers
from accelerate.utils import GradientAccumulationPlugin

from supra.errors import UserError, check_choice
from supra.uptrain.config import UptrainConfig
from supra.uptrain.stage_settings import LAYERWISE

# setting in accelerate's parallelism_config -> why it cannot work
UNSPLITTABLE = {
    "tp_size": "tensor parallelism splits projections that a mixer needs whole, so gradients would "
    "be wrong",
    "sp_size": "sequence parallelism of this kind hands no state on between the parts of a row; "
    "cp_size does",
}
# stage -> why it needs whole rows
WHOLE_ROWS = {
    "orient": "compares matrices of whole rows",
    "align": "trains layers one by one, on inputs from a pass of the teacher over whole rows",
    "extend": "reads rows in segments already, each from the state before it",
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
        parallelism_config=parallelism_config(),
    )
    check_kind(accelerator.distributed_type)
    if config.compile and accelerator.num_processes > 1:
        raise UserError(
            f"compile (=True) runs in one process, and there are {accelerator.num_processes}: with "
            "several it was never tested; set compile=false"
        )
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
        _check_shared_rows(config)
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
    processes = _processes()
    shards *= processes_of_a_row()  # which have parts of one copy, too
    if shards < 2 or copies * shards != processes:
        raise UserError(
            f"{sizes} must be copies of the model and parts of each copy: two parts or more, and "
            f"copies x parts must be the number of processes (={processes}); or leave "
            "parallelism_config out, and each process has a part of one copy"
        )


def _check_shared_rows(config: UptrainConfig) -> None:
    """Raise UserError if the launcher's cp_size does not fit the run."""
    size, processes = processes_of_a_row(), _processes()
    setting = f"parallelism_config_cp_size (={size})"
    if size == 1:
        return
    if size < 1 or processes % size:
        raise UserError(
            f"{setting} processes share each row, so it must divide the number of processes "
            f"(={processes})"
        )
    for name in config.stages:
        if name in WHOLE_ROWS:
            raise UserError(
                f"{setting} must be 1 for the stage {name}, which {WHOLE_ROWS[name]}: run it "
                "separately, then distill or tune with cp_size and the result as student"
            )
        length_setting, length = config.of_stage(name, "sequence_length")
        if length < size:
            raise UserError(
                f"{setting} is more than {length_setting} (={length}): every process needs a token "
                "of each row; lower cp_size"
            )


def processes_of_a_row() -> int:
    """How many processes have a part of each row: the launcher's cp_size."""
    return _size("cp_size") if _asked("ACCELERATE_USE_PARALLELISM_CONFIG") else 1


def parallelism_config() -> ParallelismConfig | None:
    """The launcher's sizes for accelerate, without cp_size: it would drop the masks of attention,
    and hand no states on. To accelerate, the processes of a row have different data."""
    if not _asked("ACCELERATE_USE_PARALLELISM_CONFIG"):
        return None
    shards = _size("dp_shard_size")
    if _asked("ACCELERATE_USE_FSDP"):
        shards *= processes_of_a_row()
    return ParallelismConfig(
        dp_replicate_size=_size("dp_replicate_size"), dp_shard_size=shards, cp_size=1
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


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _size(name: str) -> int:
    """A size in accelerate's parallelism_config."""
    return int(os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}", "1"))


def _asked(variable: str) -> bool:
    return os.environ.get(variable, "").lower() == "true"
