"""The stages of a run: their first and last steps, and the tokens read by then."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from supra.uptrain.config import LAYERWISE, StageConfig, UptrainConfig


@dataclass(frozen=True)
class Stage:
    """One stage of a run. `start` and `end` count the run's steps before and after it."""

    name: str
    config: StageConfig
    start: int
    end: int
    tokens_per_step: int

    @property
    def steps(self) -> int:
        return self.end - self.start


def plan(config: UptrainConfig, tokens_per_step: int) -> list[Stage]:
    """The stages of a run, in order. A step reads `tokens_per_step` tokens for each segment.

    The total number of tokens is rounded up to a whole step, and each stage has at least one step.
    """
    stages, tokens, start = [], 0, 0
    for name, count in config.stage_tokens.items():
        tokens += count
        stage = config.stages[name]
        size = tokens_per_step * (stage.segments or 1)
        steps = max(1, math.ceil((tokens - tokens_read(stages, start)) / size))
        stages.append(Stage(name, stage, start, start + steps, size))
        start += steps
    return stages


def tokens_read(stages: Sequence[Stage], step: int) -> int:
    """The number of tokens in the first `step` steps of the run."""
    return sum(
        min(max(step - stage.start, 0), stage.steps) * stage.tokens_per_step for stage in stages
    )


def wrapped_stages(config: UptrainConfig) -> dict[str, StageConfig]:
    """The stages that run through the wrapper of several processes.

    In every step, the wrapper expects gradients for the parameters that required one when it was
    made. Without such stages these are all stages, because the wrapper needs some parameters.
    """
    stages = config.stages
    return {name: stage for name, stage in stages.items() if name not in LAYERWISE} or stages
