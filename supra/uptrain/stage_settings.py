"""The settings of a stage: its tokens and rows, its learning rates, and what it learns."""

from typing import Annotated, Literal

from pydantic import Field

from supra.settings.model import Settings
from supra.uptrain.limits import PASS, STEP, TEXT, VOCABULARY

# how fast AdamW forgets: 0 at once, and at 1 it would never
Forgetting = Annotated[float, Field(ge=0, lt=1)]


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

    loss: Literal["squared", "cross_entropy"] = Field(
        "squared",
        description="Error of a matrix: squared, relative to the teacher's; or the cross entropy "
        "of its rows (Hedgehog, arXiv 2402.04347), for mixers whose weights sum to one.",
    )


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
