"""AdamW with the rates and the decay that each kind of parameter gets, and the rate over time."""

import math

import torch

from supra.mixers import NEW_PARAMETERS
from supra.uptrain.config import OptimizerConfig, ScheduleConfig

WSD_DECAY = 0.2  # last share of a warmup-stable-decay run (Hägele et al. 2024, arXiv 2405.18392)


def freeze_unused(model: torch.nn.Module, config: OptimizerConfig) -> None:
    """Parameters whose rate is 0 need no gradient."""
    for name, parameter in model.named_parameters():
        if rate(name, config) == 0:
            parameter.requires_grad_(False)


def build_optimizer(model: torch.nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Groups by rate and by weight decay.

    None for tensors of one dimension (norms, biases), and none for what conversion added: an
    identity feature map or a calibrated decay is not nearer to nothing when it is nearer to zero.
    """
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and NEW_PARAMETERS not in name
            decay = config.weight_decay if decays else 0.0
            groups.setdefault((rate(name, config), decay), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr": lr, "base_lr": lr, "weight_decay": decay}
            for (lr, decay), parameters in groups.items()
        ],
        betas=config.betas,
        fused=True,
    )


def rate(name: str, config: OptimizerConfig) -> float:
    return config.lr if NEW_PARAMETERS not in name or config.new_lr is None else config.new_lr


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def schedule_factor(step: int, steps: int, config: ScheduleConfig) -> float:
    """What the learning rate of step 0, 1, … steps - 1 is multiplied by.

    A pure function of the step, so that there is no scheduler state to save. The warm-up rises
    linearly and is over when the factor reaches 1; the last step's factor is min_ratio.
    """
    warmup = round(config.warmup * steps) if config.warmup < 1 else config.warmup
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
