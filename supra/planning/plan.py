"""The plan of a run: every stage with its memory, work, hours and price."""

import math
from typing import Any

from supra.planning import compute
from supra.planning.hardware import Hardware, Rate
from supra.planning.measure import DTYPES, Measured, Models, measure
from supra.planning.memory import LIMIT, Pass
from supra.planning.remedies import Situation, remedies
from supra.planning.report import RunPlan, StagePlan
from supra.planning.settings import find_models
from supra.uptrain import stages
from supra.uptrain.config import UptrainConfig
from supra.uptrain.stage_settings import LAYERWISE

LEARNS_FROM = {"orient": "matrices", "align": "outputs", "distill": "teacher"}


def plan(config: UptrainConfig, models: Models, hardware: Hardware, rate: Rate) -> RunPlan:
    """Plan a run. Raises UserError for one that cannot be planned."""
    found = [
        (stage, measure(models, config, stage.name, hardware.processes))
        for stage in stages.plan(config, hardware.processes)
    ]
    student, converted = models.student, getattr(models.student, "supra", None)
    return RunPlan(
        hardware=hardware,
        rate=rate,
        family=getattr(student, "base_model_type", student.model_type),
        layers=converted["layers"] if converted else ["attention"] * student.num_hidden_layers,
        parameters=found[0][1].parameters,
        stages=[_stage(config, models, hardware, rate, *pair) for pair in found],
    )


def flops_per_token(config: UptrainConfig) -> dict[str, int]:
    """FLOPs per token of each stage of a run in one process. Raises UserError for a run that cannot
    be planned."""
    models = find_models(config, None)
    return {
        stage.name: _flops(
            stage,
            measure(models, config, stage.name, 1),
            config.gradient_checkpointing and stage.name not in LAYERWISE,
        )
        for stage in stages.plan(config, 1)
    }


def _stage(
    config: UptrainConfig,
    models: Models,
    hardware: Hardware,
    rate: Rate,
    stage: stages.Stage,
    measured: Measured,
) -> StagePlan:
    run = _pass(config, hardware, stage)
    now = Situation(models, config, stage.name, measured.sizes, run)
    limit = math.floor(LIMIT * hardware.memory)
    tokens = stage.steps * stage.tokens_per_step
    flops = tokens * _flops(stage, measured, run.checkpointing)
    hours = compute.hours(flops, hardware.processes, rate.tflops, rate.mfu)
    return StagePlan(
        name=stage.name,
        steps=stage.steps,
        tokens=tokens,
        tokens_per_step=stage.tokens_per_step,
        trained=measured.trained,
        memory=now.memory,
        fits=now.memory.peak <= limit,
        remedies=remedies(now, limit),
        kept_per_token=_largest_block(measured, stage.sequence_length),
        flops=flops,
        hours=hours,
        cost=None if rate.price is None else hours * hardware.processes * rate.price,
    )


def _pass(config: UptrainConfig, hardware: Hardware, stage: stages.Stage) -> Pass:
    return Pass(
        rows=stage.batch_size,
        length=stage.sequence_length,
        width=DTYPES[config.precision].itemsize,
        hardware=hardware,
        accumulates=stage.accumulation * (stage.config.segments or 1) > 1,
        checkpointing=config.gradient_checkpointing and stage.name not in LAYERWISE,
        learns_from=LEARNS_FROM.get(stage.name, "text"),
    )


def _flops(stage: stages.Stage, measured: Measured, checkpointing: bool) -> int:
    """Per token."""
    if stage.name in LAYERWISE:
        return compute.layer_by_layer(measured.work, stage.sequence_length)
    return compute.end_to_end(measured.work, stage.sequence_length, checkpointing)


def _largest_block(measured: Measured, length: int) -> dict[str, float]:
    """Bytes per token, by part, of the block that keeps most."""
    layers = measured.sizes.kept.layers
    largest: dict[str, Any] = max(layers, key=lambda parts: sum(parts.values()))
    return {part: size / length for part, size in largest.items()}
