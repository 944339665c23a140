"""The stages of a run: their first and last steps, and the tokens read by then."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from supra.uptrain.config import UptrainConfig
from supra.uptrain.stage_settings import LAYERWISE, StageConfig


@dataclass(frozen=True)
class Stage:
    """One stage of a run. `start` and `end` count the run's steps before and after it.

    A row has `sequence_length` tokens, times the segments of the stage; `length_setting` is the
    name of the setting that says so. A step has `batch_size` rows in each of `accumulation` forward
    passes of each process, `tokens_per_step` tokens in all.
    """

    name: str
    config: StageConfig
    sequence_length: int
    length_setting: str
    batch_size: int
    accumulation: int
    tokens_per_step: int
    start: int
    end: int

    @property
    def steps(self) -> int:
        return self.end - self.start

    @property
    def rows(self) -> int:
        """The rows of a step in all processes."""
        return self.tokens_per_step // (self.sequence_length * (self.config.segments or 1))

    @property
    def passes(self) -> int:
        """The forward passes of a step in all processes."""
        return self.rows // self.batch_size

    @property
    def row(self) -> tuple[int, int | None, str]:
        """What `BlockStream.cut` takes."""
        return self.sequence_length, self.config.segments, self.length_setting


def plan(config: UptrainConfig, processes: int) -> list[Stage]:
    """The stages of a run, in order.

    The total number of tokens is rounded up to a whole step, and each stage has at least one step.
    """
    stages, tokens, start = [], 0, 0
    for name, count in config.stage_tokens.items():
        tokens += count
        stage = config.stages[name]
        setting, length = config.of_stage(name, "sequence_length")
        _, rows = config.of_stage(name, "batch.size")
        _, accumulation = config.of_stage(name, "batch.accumulation")
        size = rows * accumulation * processes * length * (stage.segments or 1)
        steps = max(1, math.ceil((tokens - tokens_read(stages, start)) / size))
        sizes = length, setting, rows, accumulation, size
        stages.append(Stage(name, stage, *sizes, start, start + steps))
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
