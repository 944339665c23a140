"""Every setting of an uptraining run: the YAML file has the tree of these classes.

Defaults here, then the file, then `a.b=c` on the command line; see `supra.uptrain.tree`. A field
states its own bounds; rules between settings are in `supra.uptrain.rules`.
"""

import math
from functools import reduce
from typing import Annotated, Literal

from pydantic import Field

from supra.settings.model import Names, Settings
from supra.uptrain.data_settings import DataConfig
from supra.uptrain.limits import COUNT, PASS, SEED, STEP, TEXT, VOCABULARY, WIDTH

# how fast AdamW forgets: 0 at once, and at 1 it would never
Forgetting = Annotated[float, Field(ge=0, lt=1)]


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


class OptimizerConfig(Settings):
    """AdamW. Parameters whose rate is 0 do not move."""

    lr: float = Field(3e-4, ge=0, description="Highest learning rate; 0 freezes.")
    attention_lr: float | None = Field(
        None, ge=0, description="Rate of the attention modules' inherited weights; null: lr."
    )
    new_lr: float | None = Field(
        None,
        ge=0,
        description="Rate of the parameters that conversion added (`.mixer.` in their names); "
        "null: lr.",
    )
    betas: tuple[Forgetting, Forgetting] = Field(
        (0.9, 0.95), description="Decay of the averages of gradients and of their squares."
    )
    weight_decay: float = Field(0.0, ge=0, description="Weight decay, decoupled from gradients.")
    clip: float = Field(
        1.0,
        ge=0,
        description="Largest norm of the gradient; in orient and align, of each layer's gradient. "
        "0: no clipping.",
    )


class ScheduleConfig(Settings):
    """The learning rate over a stage."""

    kind: Literal["cosine", "wsd", "constant"] = Field(
        "cosine",
        description="Shape after warmup: a cosine; warmup, stable, decay; or constant.",
    )
    warmup: float = Field(
        0.05, ge=0, le=TEXT, description="Steps of warmup; below 1, a share of the stage's steps."
    )
    min_ratio: float = Field(
        0.1, ge=0, le=1, description="Last rate divided by the highest one, for cosine and wsd."
    )


class StageBatchConfig(Settings):
    """Rows of a step of one stage."""

    size: int | None = Field(
        None,
        ge=1,
        le=PASS,
        description="Rows of one forward pass of one process; null: batch.size.",
    )
    accumulation: int | None = Field(
        None,
        ge=1,
        le=STEP,
        description="Forward passes of each process in a step; null: batch.accumulation.",
    )


class StageConfig(Settings):
    """A part of the run, with its own rates, and rows of its own length if it gives one.

    At most one stage may give neither tokens nor a share: it gets what the others leave.
    """

    tokens: int | None = Field(None, ge=1, le=TEXT, description="Tokens of the stage.")
    share: float | None = Field(
        None, gt=0, le=1, description="Tokens of the stage as a share of the budget."
    )
    sequence_length: int | None = Field(
        None,
        ge=2,
        le=PASS,
        description="Tokens of a row in this stage; null: data.sequence_length.",
    )
    batch: StageBatchConfig = Field(
        default_factory=StageBatchConfig, description="Rows of a step in this stage."
    )
    optimizer: OptimizerConfig = Field(
        default_factory=OptimizerConfig, description="AdamW and its learning rates."
    )
    schedule: ScheduleConfig = Field(
        default_factory=ScheduleConfig, description="The learning rate over the stage."
    )

    @property
    def segments(self) -> int | None:
        """Parts of sequence_length tokens that a row has, of one document; None: a row is one of
        them, and documents are packed."""
        return None


class OrientConfig(StageConfig):
    """Each layer learns its teacher's attention matrix (MOHAWK's first stage, arXiv 2408.10189).

    Every layer reads what the teacher's layer reads, and only attention modules are trained.
    """


class AlignConfig(StageConfig):
    """Each layer learns what its teacher's attention makes of the teacher's own hidden states.

    Only attention modules are trained: inherited weights at `lr`, new ones at `new_lr`; with lora
    new ones alone.
    """

    # LoLCATs (arXiv 2410.10254) learns the first, RADLADS (2505.03005) the second
    target: Literal["output", "hidden"] = Field(
        "hidden",
        description="What a layer learns: its attention's output before the output projection, or "
        "the hidden states after it.",
    )


class DistillConfig(StageConfig):
    """End to end, towards the teacher's distribution.

    `cache` takes 6 bytes for each of the `top_k` tokens: with 64 of them 384 bytes a token, 3.8 GB
    for 10M tokens. A run whose text is all there does not load the teacher.
    """

    kl: float = Field(1.0, ge=0, description="Weight of KL(teacher || student).")
    next_token: float = Field(0.0, ge=0, description="Weight of the next-token cross entropy.")
    temperature: float = Field(1.0, gt=0, description="Temperature of both distributions in KL.")
    top_k: int | None = Field(
        None,
        ge=1,
        le=VOCABULARY,
        description="Keep the teacher's k likeliest tokens, and one bucket for all others.",
    )
    cache: str | None = Field(
        None, description="Folder that keeps the teacher's top_k tokens for later runs."
    )


class TuneConfig(StageConfig):
    """End to end, next-token cross entropy alone; needs no teacher."""


class ExtendConfig(StageConfig):
    """End to end, next-token cross entropy, on documents longer than sequence_length.

    The segments of a row are read one after the other, each from the state in which the one before
    ended and without a gradient into it: back-propagation through time, truncated (Chen et al.,
    arXiv 2410.07145v2). A step's gradient is that of the mean over all tokens of all rows.

    initial_state (Buitrago & Gu, arXiv 2507.02782): "noise" is Gaussian, as large as the states at
    the ends of rows are where the stage begins; "carried" is where the row in the same place of the
    step before ended. Layers that keep softmax attention hold tokens and not a state: they begin
    every row with nothing.
    """

    state_passing: int = Field(
        12,
        ge=1,
        le=PASS,
        description="Segments of sequence_length tokens that a row has, of one document.",
    )
    initial_state: Literal["zero", "noise", "carried"] = Field(
        "zero",
        description="The state before a row's first segment: zero, Gaussian noise, or carried over "
        "from the row before.",
    )

    @property
    def segments(self) -> int:
        return self.state_passing


STAGES = ("orient", "align", "distill", "tune", "extend")  # in the order in which they run
LAYERWISE = ("orient", "align")


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
        description="Keep the checkpoint with the lowest held-out loss besides the last ones: each "
        "evaluation below all before it writes one. With export, out/final has its weights, and "
        "otherwise those after the last step.",
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
