"""Every setting of an uptraining run: the YAML file has the tree of these classes.

The texts have theirs in data_settings.py, and the stages in stage_settings.py. Defaults are here,
then comes the file, then `a.b=c` on the command line; see `supra.uptrain.tree`. A field states its
own bounds; rules between settings are in `supra.uptrain.rules`.
"""

import math
from functools import reduce
from typing import Literal

from pydantic import Field

from supra.settings.model import Names, Settings
from supra.uptrain.data_settings import DataConfig
from supra.uptrain.limits import COUNT, PASS, SEED, STEP, TEXT, WIDTH
from supra.uptrain.stage_settings import (
    STAGES,
    AlignConfig,
    DistillConfig,
    ExtendConfig,
    OrientConfig,
    StageConfig,
    TuneConfig,
)


class CalibrateConfig(Settings):
    """Starting values of the mixers from the teacher's attention on the first tokens of the text
    (supra/conversion/calibrate.py)."""

    tokens: int = Field(
        0, ge=0, le=PASS, description="Tokens to calibrate on; 0 keeps what conversion wrote."
    )
    projections: bool = Field(
        False,
        description="Also fit the attention modules' output projections. Needs at least four rows "
        "of data.sequence_length, and no lora.",
    )


class BudgetConfig(Settings):
    """Tokens of the whole run: a number, or a share of the teacher's pretraining tokens.

    Both null: what the stages say. SUPRA's own budget is a share of about 0.05 (arXiv 2405.06640,
    abstract).
    """

    tokens: int | None = Field(None, ge=1, le=TEXT, description="Tokens of the whole run.")
    share: float | None = Field(
        None, gt=0, le=1000, description="Tokens of the run as a share of budget.teacher_tokens."
    )
    teacher_tokens: int | None = Field(
        None, ge=1, le=TEXT, description="Tokens that the teacher was pretrained on."
    )

    @property
    def total(self) -> int | None:
        return self.tokens if self.share is None else math.ceil(self.share * self.teacher_tokens)


class BatchConfig(Settings):
    """A step sees size x accumulation x processes rows of sequence_length tokens, in the stage
    extend of state_passing times as many. A stage may have values of its own."""

    size: int = Field(8, ge=1, le=PASS, description="Rows of one forward pass of one process.")
    accumulation: int = Field(
        1, ge=1, le=STEP, description="Forward passes of each process in a step."
    )


class LoraConfig(Settings):
    """Low-rank adapters on the pretrained projections; what conversion added trains in full."""

    rank: int = Field(16, ge=1, le=WIDTH, description="Rank of an adapter.")
    alpha: float = Field(32.0, gt=0, description="An adapter's output is scaled by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout of an adapter's input.")
    targets: Names = Field(
        (), description="Names of modules to adapt; none: all projections of the attention."
    )


class EvalConfig(Settings):
    """Held-out perplexity at the start, after calibration and after every stage."""

    every: int = Field(
        0, ge=0, le=TEXT, description="Steps between evaluations within a stage; 0: none."
    )
    tokens: int = Field(
        100_000, ge=1, le=TEXT, description="Tokens of the held-out text to evaluate on, at most."
    )


class CheckpointConfig(Settings):
    """Full training state, at the end of the run and when it is interrupted."""

    every: int = Field(
        500, ge=0, le=TEXT, description="Steps between checkpoints during the run; 0: none."
    )
    keep: int = Field(2, ge=1, le=TEXT, description="Checkpoints that stay; older ones go.")
    best: Literal["keep", "export"] | None = Field(
        None,
        description="Keep the checkpoint with the lowest held-out loss besides the last ones. An "
        "evaluation with a lower loss than all before it writes a checkpoint. With export, "
        "out/final has the weights of the best checkpoint; otherwise those after the last step.",
    )


class UptrainConfig(Settings):
    """A run: calibration, and up to five stages in the order orient, align, distill, tune, extend.

    A stage that is null does not run; `tune: {}` runs with its defaults.
    """

    student: str = Field(description="Converted checkpoint to train: a folder or hub id.")
    out: str = Field(description="Folder of the run; the result is in its folder final.")
    data: DataConfig = Field(
        default_factory=DataConfig, description="Training text, and held-out text."
    )
    seed: int = Field(0, ge=0, le=SEED, description="Seed of all random numbers.")
    teacher: str | None = Field(
        None, description="Transformer that distill learns from: a folder or hub id."
    )
    calibrate: CalibrateConfig = Field(
        default_factory=CalibrateConfig,
        description="Starting values of the mixers from the teacher's attention, before step 1.",
    )
    budget: BudgetConfig = Field(
        default_factory=BudgetConfig,
        description="Tokens of the whole run, for the stages to share.",
    )
    orient: OrientConfig | None = Field(
        None, description="Stage 1: each layer learns its teacher's attention matrix."
    )
    align: AlignConfig | None = Field(
        None, description="Stage 2: each layer learns its teacher's attention output."
    )
    distill: DistillConfig | None = Field(
        None, description="Stage 3: end to end, towards the teacher's distribution."
    )
    tune: TuneConfig | None = Field(
        None, description="Stage 4: end to end, next-token loss; needs no teacher."
    )
    extend: ExtendConfig | None = Field(
        None, description="Stage 5: next-token loss on documents longer than a row."
    )
    batch: BatchConfig = Field(default_factory=BatchConfig, description="Rows of a step.")
    precision: Literal["bf16", "fp32"] = Field(
        "bf16", description="bf16 computes in bfloat16 where that is safe; weights stay float32."
    )
    gradient_checkpointing: bool = Field(
        False, description="Compute activations again in the backward pass, to save memory."
    )
    compile: bool = Field(
        False,
        description="Compile the models' blocks with torch.compile, for align, distill and tune in "
        "one process: less time for each step, after the time that compiling takes.",
    )
    lora: LoraConfig | None = Field(
        None, description="Train low-rank adapters instead of the pretrained projections."
    )
    max_skipped_steps: int = Field(
        0,
        ge=0,
        le=COUNT,
        description="Steps in a row that may be skipped because their loss or gradient is not "
        "finite; one more ends the run. 0: the first one ends it.",
    )
    peak_tflops: float | None = Field(
        None,
        gt=0,
        le=COUNT,
        description="Peak of one GPU in the run's precision, in 10^12 FLOPs a second; with it, the "
        "log has mfu, the share of it that the run reaches.",
    )
    trackers: Names = Field(
        (), description="Experiment trackers that Accelerate knows, such as tensorboard or wandb."
    )
    eval: EvalConfig = Field(default_factory=EvalConfig, description="Held-out perplexity.")
    checkpoint: CheckpointConfig = Field(
        default_factory=CheckpointConfig, description="Full training state, to resume from."
    )
    resume: bool = Field(
        True, description="Continue from the last checkpoint in out, if there is one."
    )

    @property
    def stages(self) -> dict[str, StageConfig]:
        """The stages that run, by name and in order."""
        return {name: stage for name in STAGES if (stage := getattr(self, name)) is not None}

    def of_stage(self, stage: str, key: str) -> tuple[str, int]:
        """The dotted name and the value of sequence_length, batch.size or batch.accumulation in a
        stage: its own, or the run's."""
        own = reduce(getattr, key.split("."), getattr(self, stage))
        if own is not None:
            return f"{stage}.{key}", own
        shared = "data.sequence_length" if key == "sequence_length" else key
        return shared, reduce(getattr, shared.split("."), self)

    @property
    def stage_tokens(self) -> dict[str, int]:
        """Tokens of each stage."""
        total = self.budget.total
        tokens = {
            name: stage.tokens if stage.share is None else max(1, round(stage.share * total))
            for name, stage in self.stages.items()
        }
        taken = sum(count for count in tokens.values() if count is not None)
        return {name: total - taken if count is None else count for name, count in tokens.items()}
