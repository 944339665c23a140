"""At which steps each stage of a run begins and ends, and how many tokens are read by then."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from supra.uptrain.config import StageConfig, UptrainConfig


@dataclass(frozen=True)
class Stage:
    name: str
    config: StageConfig
    start: int  # steps of the run that are done before it
    end: int  # and after it
    tokens_per_step: int

    @property
    def steps(self) -> int:
        return self.end - self.start


def plan(config: UptrainConfig, tokens_per_step: int) -> list[Stage]:
    """The stages that run, one after the other; a step has `tokens_per_step` for each segment.

    All together take their tokens rounded up to a step; each has one step at least.
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
    """Tokens of the run's first steps."""
    return sum(
        min(max(step - stage.start, 0), stage.steps) * stage.tokens_per_step for stage in stages
    )
