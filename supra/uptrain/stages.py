"""At which steps each stage of a run begins and ends."""

import math
from dataclasses import dataclass

from supra.uptrain.config import StageConfig, UptrainConfig


@dataclass(frozen=True)
class Stage:
    name: str
    config: StageConfig
    start: int  # steps of the run that are done before it
    end: int  # and after it

    @property
    def steps(self) -> int:
        return self.end - self.start


def plan(config: UptrainConfig, tokens_per_step: int) -> list[Stage]:
    """The stages that run, one after the other.

    All together take their tokens rounded up to a step; each has one step at least.
    """
    stages, tokens, start = [], 0, 0
    for name, count in config.stage_tokens.items():
        tokens += count
        end = max(start + 1, math.ceil(tokens / tokens_per_step))
        stages.append(Stage(name, config.stages[name], start, end))
        start = end
    return stages
