"""AdamW with the rates and the decay that each kind of parameter gets, and the rate over time."""

import math
from collections.abc import Mapping

import torch

from supra.errors import UserError
from supra.mixers import NEW_PARAMETERS
from supra.model.attention import attention_modules
from supra.uptrain.config import LAYERWISE, OptimizerConfig, ScheduleConfig, StageConfig

WSD_DECAY = 0.2  # last share of a warmup-stable-decay run (Hägele et al. 2024, arXiv 2405.18392)


def build_optimizer(model: torch.nn.Module, stages: Mapping[str, StageConfig]) -> torch.optim.AdamW:
    """One optimizer for all that any of the stages trains; `begin_stage` sets its rates.

    In groups by kind and by weight decay: none for tensors of one dimension (norms, biases), and
    none for what conversion added: an identity feature map or a calibrated decay is not nearer to
    nothing when it is nearer to zero. Raises UserError where a stage would train nothing.
    """
    groups: dict[tuple[str, bool], list[torch.nn.Parameter]] = {}
    for parameter, kind in trainable(model, stages):
        decays = parameter.ndim > 1 and kind != "new"
        groups.setdefault((kind, decays), []).append(parameter)
    for stage, config in stages.items():
        if not any(rate(kind, stage, config.optimizer) for kind, _ in groups):
            raise UserError(
                f"{stage} trains nothing: this student has no parameters with a rate above 0; "
                f"set {stage}.optimizer.lr, or {stage}=null"
            )
    return torch.optim.AdamW(
        [
            {"params": parameters, "kind": kind, "decays": decays}
            for (kind, decays), parameters in groups.items()
        ],
        fused=True,
    )


def trainable(
    model: torch.nn.Module, stages: Mapping[str, StageConfig]
) -> list[tuple[torch.nn.Parameter, str]]:
    """The parameters with a gradient that one of the stages moves, and the kind of each: `new`
    (what conversion added), `adapter` (LoRA), `attention` (inherited, in an attention module) or
    `other`."""
    inside = {id(x) for attention in attention_modules(model) for x in attention.parameters()}
    found = []
    for name, parameter in model.named_parameters():
        if NEW_PARAMETERS in name:
            kind = "new"
        elif "lora_" in name:
            kind = "adapter"
        else:
            kind = "attention" if id(parameter) in inside else "other"
        rates = (rate(kind, stage, config.optimizer) for stage, config in stages.items())
        if parameter.requires_grad and any(rates):
            found.append((parameter, kind))
    return found


def rate(kind: str, stage: str, config: OptimizerConfig) -> float:
    """The highest learning rate of a kind of parameters in a stage."""
    if kind == "new":
        return config.lr if config.new_lr is None else config.new_lr
    if kind == "attention":
        return config.lr if config.attention_lr is None else config.attention_lr
    return 0.0 if stage in LAYERWISE else config.lr


def begin_stage(optimizer: torch.optim.Optimizer, stage: str, config: OptimizerConfig) -> None:
    """Give every group what it has in this stage."""
    for group in optimizer.param_groups:
        group["base_lr"] = rate(group["kind"], stage, config)
        group["weight_decay"] = config.weight_decay if group["decays"] else 0.0
        group["betas"] = config.betas


def freeze_unused(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """What the optimizer does not have needs no gradient."""
    trained = {id(x) for group in optimizer.param_groups for x in group["params"]}
    for parameter in model.parameters():
        if id(parameter) not in trained:
            parameter.requires_grad_(False)


def require_gradients(optimizer: torch.optim.Optimizer, stages: Mapping[str, StageConfig]) -> None:
    """A gradient for what any of these stages moves, of all that the optimizer has."""
    for group in optimizer.param_groups:
        rates = [rate(group["kind"], stage, config.optimizer) for stage, config in stages.items()]
        for parameter in group["params"]:
            parameter.requires_grad_(any(rates))


def drop_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Of what does not move in this stage, so that no norm counts them."""
    for group in optimizer.param_groups:
        if group["base_lr"] == 0:
            for parameter in group["params"]:
                parameter.grad = None


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def warmup_steps(steps: int, config: ScheduleConfig) -> int:
    """Of a stage of `steps`."""
    return round(config.warmup * steps) if config.warmup < 1 else round(config.warmup)


def check_warmup(name: str, steps: int, config: ScheduleConfig) -> None:
    """Raise UserError for a stage whose rate would not get to where the schedule goes on."""
    warmup = warmup_steps(steps, config)
    most = steps - 1 if config.kind != "wsd" else round((1 - WSD_DECAY) * steps)
    if warmup > max(0, most):
        raise UserError(
            f"{name}.schedule.warmup (={config.warmup}) is {warmup} of the stage's {steps} steps, "
            f"and {config.kind} leaves room for {most}: give a share of them, 0.1 say, or train on "
            "more tokens"
        )


def schedule_factor(step: int, steps: int, config: ScheduleConfig) -> float:
    """What the learning rate of step 0, 1, … steps - 1 of a stage is multiplied by.

    A pure function of the step, so that there is no scheduler state to save. The warm-up rises
    linearly and is over when the factor reaches 1; the last step's factor is min_ratio.
    """
    warmup = warmup_steps(steps, config)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    last = max(1, steps - 1)
    if config.kind == "constant":
        return 1.0
    if config.kind == "cosine":
        done = (step - warmup) / max(1, last - warmup)
        return config.min_ratio + (1 - config.min_ratio) * (1 + math.cos(math.pi * done)) / 2
    decay_steps = max(1, WSD_DECAY * steps)
    done = max(0.0, 1 - (last - step) / decay_steps)
    return 1 - (1 - config.min_ratio) * math.sqrt(done)
