"""The plan of a run: every stage with its memory, work, hours and price."""

import math
from typing import Any

from supra.errors import UserError
from supra.planning import compute
from supra.planning.hardware import Gpus, Hardware, Rate
from supra.planning.measure import DTYPES, Measured, Models, measure
from supra.planning.memory import LIMIT, Pass
from supra.planning.remedies import Situation, remedies
from supra.planning.report import RunPlan, StagePlan
from supra.planning.settings import find_models
from supra.planning.simulate import simulate
from supra.uptrain import stages
from supra.uptrain.accelerator import WHOLE_ROWS
from supra.uptrain.config import UptrainConfig
from supra.uptrain.stage_settings import LAYERWISE

LEARNS_FROM = {"orient": "matrices", "align": "outputs", "distill": "teacher"}


def plan(
    config: UptrainConfig,
    models: Models,
    hardware: Hardware,
    rate: Rate,
    simulated: bool = False,
) -> RunPlan:
    """Plan a run. Raises UserError for one that cannot be planned.

    simulated: also run a step of each stage on tensors without memory, and track what they take.
    """
    _check_shared_rows(config, hardware, simulated)
    found = [
        (stage, measure(models, config, stage.name, hardware))
        for stage in stages.plan(config, hardware.readers)
    ]
    student, converted = models.student, getattr(models.student, "supra", None)
    return RunPlan(
        hardware=hardware,
        rate=rate,
        family=getattr(student, "base_model_type", student.model_type),
        layers=converted["layers"] if converted else ["attention"] * student.num_hidden_layers,
        parameters=found[0][1].parameters,
        stages=[_stage(config, models, hardware, rate, *pair, simulated) for pair in found],
    )


def flops_per_token(config: UptrainConfig) -> dict[str, int]:
    """FLOPs per token of each stage of a run in one process. Raises UserError for a run that cannot
    be planned."""
    models, one = find_models(config, None), Hardware(Gpus(count=1, gigabytes=1))
    found = {}
    for stage in stages.plan(config, one.readers):
        measured = measure(models, config, stage.name, one)
        flops = flops_of(stage, measured, pass_of(config, one, stage))
        found[stage.name] = flops // (stage.steps * stage.tokens_per_step)
    return found


def _check_shared_rows(config: UptrainConfig, hardware: Hardware, simulated: bool) -> None:
    size = hardware.cp_size
    if size == 1:
        return
    if simulated:
        raise UserError(
            f"--simulate needs whole rows, and --cp-size is {size}: processes agree on their parts "
            "by exchanging numbers, and simulated ones have none; leave one of them out"
        )
    for name in config.stages:
        if name in WHOLE_ROWS:
            raise UserError(
                f"--cp-size (={size}) must be 1 for the stage {name}, which {WHOLE_ROWS[name]}: "
                f"plan the others with {name}=null"
            )
        setting, length = config.of_stage(name, "sequence_length")
        if length < size:
            raise UserError(
                f"--cp-size (={size}) is more than {setting} (={length}): every GPU needs a token "
                "of each row"
            )


def _stage(
    config: UptrainConfig,
    models: Models,
    hardware: Hardware,
    rate: Rate,
    stage: stages.Stage,
    measured: Measured,
    simulated: bool,
) -> StagePlan:
    run = pass_of(config, hardware, stage)
    now = Situation(models, config, stage.name, measured.sizes, run)
    limit = math.floor(LIMIT * hardware.memory)
    alone, together = remedies(now, limit)
    flops = flops_of(stage, measured, run)
    hours = compute.hours(flops, hardware.processes, rate.tflops, rate.mfu)
    return StagePlan(
        name=stage.name,
        steps=stage.steps,
        tokens=stage.steps * stage.tokens_per_step,
        tokens_per_step=stage.tokens_per_step,
        trained=measured.trained,
        memory=now.memory,
        fits=now.memory.peak <= limit,
        simulated=simulate(models, config, stage, hardware) if simulated else None,
        remedies=alone,
        together=together,
        kept_per_token=_largest_block(measured, run.length),
        flops=flops,
        hours=hours,
        cost=None if rate.price is None else hours * hardware.processes * rate.price,
    )


def pass_of(config: UptrainConfig, hardware: Hardware, stage: stages.Stage) -> Pass:
    """A forward pass of a process in this stage."""
    return Pass(
        rows=stage.batch_size,
        length=math.ceil(stage.sequence_length / hardware.cp_size),
        row=stage.sequence_length,
        width=DTYPES[config.precision].itemsize,
        hardware=hardware,
        accumulates=stage.accumulation * (stage.config.segments or 1) > 1,
        checkpointing=config.gradient_checkpointing and stage.name not in LAYERWISE,
        learns_from=_learns_from(config, stage.name),
    )


def _learns_from(config: UptrainConfig, stage: str) -> str:
    if stage == "distill" and config.distill.top_k is not None:
        return "top_k"
    return LEARNS_FROM.get(stage, "text")


def flops_of(stage: stages.Stage, measured: Measured, run: Pass) -> int:
    """Of all tokens of a stage."""
    work, length = measured.work, stage.sequence_length
    if stage.name in LAYERWISE:
        per_token = compute.layer_by_layer(work, length)
    else:
        per_token = compute.end_to_end(work, length, run.checkpointing)
    return stage.steps * stage.tokens_per_step * per_token


def _largest_block(measured: Measured, length: int) -> dict[str, float]:
    """Bytes per token, by part, of the block that keeps most."""
    layers = measured.sizes.kept.layers
    largest: dict[str, Any] = max(layers, key=lambda parts: sum(parts.values()))
    return {part: size / length for part, size in largest.items()}
