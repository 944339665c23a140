"""AdamW with learning rates and weight decay by kind of parameter, and the schedule of the
rates."""

import math
from collections.abc import Mapping

import torch

from supra.errors import UserError
from supra.mixers import Mixer
from supra.model.attention import attention_modules
from supra.uptrain.stage_settings import LAYERWISE, OptimizerConfig, ScheduleConfig, StageConfig

WSD_DECAY = 0.2  # last share of a warmup-stable-decay run (Hägele et al. 2024, arXiv 2405.18392)


def build_optimizer(model: torch.nn.Module, stages: Mapping[str, StageConfig]) -> torch.optim.AdamW:
    """One optimizer for all parameters that any stage trains; `begin_stage` sets its rates.

    Parameters are grouped by kind and by weight decay. One-dimensional parameters (norms, biases)
    have no weight decay, and neither have those that conversion added: zero is no natural value for
    an identity feature map or a calibrated decay. Raises UserError if a stage would train nothing.
    """
    groups: dict[tuple[str, bool], list[torch.nn.Parameter]] = {}
    for parameter, kind in trainable(model, stages):
        decays = parameter.ndim > 1 and kind != "new"
        groups.setdefault((kind, decays), []).append(parameter)
    for stage, config in stages.items():
        if not any(rate(kind, stage, config.optimizer) for kind, _ in groups):
            raise UserError(
                f"{stage} trains nothing: no parameter of this student has a rate above 0; set "
                f"{stage}.optimizer.lr, or {stage}=null"
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
    """The parameters that require a gradient and that a stage trains, with their kinds.

    The kinds are `new` (added by conversion), `adapter` (LoRA), `attention` (inherited, in an
    attention module) and `other`.
    """
    inside = {id(x) for attention in attention_modules(model) for x in attention.parameters()}
    mixers = (module for module in model.modules() if isinstance(module, Mixer))
    new = {id(x) for mixer in mixers for x in mixer.parameters()}
    found = []
    for name, parameter in model.named_parameters():
        if id(parameter) in new:
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
    """The peak learning rate of a kind of parameter in a stage."""
    if kind == "new":
        return config.lr if config.new_lr is None else config.new_lr
    if kind == "attention":
        return config.lr if config.attention_lr is None else config.attention_lr
    return 0.0 if stage in LAYERWISE else config.lr


def begin_stage(optimizer: torch.optim.Optimizer, stage: str, config: OptimizerConfig) -> None:
    """Set the learning rate, weight decay and betas of every group for a stage."""
    for group in optimizer.param_groups:
        group["base_lr"] = rate(group["kind"], stage, config)
        group["weight_decay"] = config.weight_decay if group["decays"] else 0.0
        group["betas"] = config.betas


def freeze_unused(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Turn off gradients for parameters that the optimizer does not have."""
    trained = {id(x) for group in optimizer.param_groups for x in group["params"]}
    for parameter in model.parameters():
        if id(parameter) not in trained:
            parameter.requires_grad_(False)


def require_gradients(optimizer: torch.optim.Optimizer, stages: Mapping[str, StageConfig]) -> None:
    """Turn on gradients for the optimizer's parameters that any of these stages trains, and turn
    them off for its other parameters."""
    for group in optimizer.param_groups:
        rates = [rate(group["kind"], stage, config.optimizer) for stage, config in stages.items()]
        for parameter in group["params"]:
            parameter.requires_grad_(any(rates))


def drop_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Drop the gradients of parameters that this stage does not train, so that norms exclude
    them."""
    for group in optimizer.param_groups:
        if group["base_lr"] == 0:
            for parameter in group["params"]:
                parameter.grad = None


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def warmup_steps(steps: int, config: ScheduleConfig) -> int:
    """The number of warmup steps in a stage of `steps` steps."""
    return round(config.warmup * steps) if config.warmup < 1 else round(config.warmup)


def check_warmup(name: str, steps: int, config: ScheduleConfig) -> None:
    """Raise UserError for a stage that is too short for its warmup."""
    warmup = warmup_steps(steps, config)
    maximum = steps - 1 if config.kind != "wsd" else round((1 - WSD_DECAY) * steps)
    if warmup > max(0, maximum):
        raise UserError(
            f"{name}.schedule.warmup (={config.warmup}) is {warmup} of the stage's {steps} steps, "
            f"and {config.kind} leaves room for {maximum}: give a share of the steps, such as 0.1, "
            "or train on more tokens"
        )


def schedule_factor(step: int, steps: int, config: ScheduleConfig) -> float:
    """The factor of the learning rate at step 0, 1, … steps - 1 of a stage.

    It only depends on the step, so that there is no scheduler state to save. During the warmup the
    factor rises linearly to 1; at the last step it is min_ratio.
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
