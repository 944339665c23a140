"""Every setting of an uptraining run: the YAML file has the tree of these classes.

Defaults here, then the file, then `a.b=c` on the command line; see `supra.uptrain.tree`. What is
wrong between settings is found in `supra.uptrain.rules`.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from supra.uptrain.rules import check


@dataclass(frozen=True)
class DataConfig:
    """Training text, and the held-out text of which exactly one source may be given."""

    path: str  # a hub name, or a file, folder or glob of .jsonl, .jsonl.gz, .txt, .parquet
    name: str | None = None  # the hub data set's configuration
    split: str = "train"  # of a hub data set, as eval_split
    text_field: str = "text"
    streaming: bool = False
    sequence_length: int = 2048
    shuffle_seed: int | None = 0  # null: the files' own order, every epoch
    shuffle_buffer: int = 10_000  # documents; only streamed data is shuffled through a buffer
    min_document_tokens: int = 0  # shorter documents are not trained on
    eval_path: str | None = None
    eval_split: str | None = None
    eval_documents: int = 0  # the first n documents are never trained on


@dataclass(frozen=True)
class CalibrateConfig:
    """Starting values of the mixers from the teacher's attention on the first tokens of the text,
    before the first step (supra/conversion/calibrate.py). 0: they stay what conversion wrote.

    projections: also fit the attention modules' output projections to what the mixers return; takes
        four rows of data.sequence_length at least, and no lora.
    """

    tokens: int = 0
    projections: bool = False


@dataclass(frozen=True)
class BudgetConfig:
    """Tokens of the whole run: a number, or a share of the teacher's pretraining tokens.

    Both null: what the stages say. SUPRA's own budget is a share of about 0.05 (arXiv 2405.06640,
    abstract).
    """

    tokens: int | None = None
    share: float | None = None
    teacher_tokens: int | None = None

    @property
    def total(self) -> int | None:
        return self.tokens if self.share is None else math.ceil(self.share * self.teacher_tokens)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW. Parameters whose rate is 0 do not move."""

    lr: float = 3e-4
    attention_lr: float | None = None  # inherited weights of the attention modules; null: lr
    new_lr: float | None = None  # what conversion added (`.mixer.` in the name); null: lr
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip: float = 1.0  # largest gradient norm, in orient and align of each layer; 0: no clipping


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over a stage; `warmup` is a number of steps, or a share of them when < 1."""

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup: float = 0.05
    min_ratio: float = 0.1  # the last step's rate over the highest; cosine and wsd


@dataclass(frozen=True)
class StageConfig:
    """A part of the run, with its own rates: so many tokens, or a share of the budget.

    At most one stage may give neither: it gets what the others leave.
    """

    tokens: int | None = None
    share: float | None = None
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    @property
    def segments(self) -> int | None:
        """Parts of data.sequence_length tokens that a row has, of one document; None: a row is one
        of them, and documents are packed."""
        return None


@dataclass(frozen=True)
class OrientConfig(StageConfig):
    """Each layer learns its teacher's attention matrix (MOHAWK's first stage, arXiv 2408.10189).

    Every layer reads what the teacher's layer reads, and only attention modules are trained.
    """


@dataclass(frozen=True)
class AlignConfig(StageConfig):
    """Each layer learns what its teacher's attention makes of the teacher's own hidden states.

    Only attention modules are trained: inherited weights at `lr`, new ones at `new_lr`; with lora
    new ones alone.
    """

    # before the output projection (LoLCATs, arXiv 2410.10254), or after it (RADLADS, 2505.03005)
    target: Literal["output", "hidden"] = "hidden"


@dataclass(frozen=True)
class DistillConfig(StageConfig):
    """End to end, towards the teacher's distribution: weights of KL(teacher || student) at a
    temperature, and of next-token cross entropy.

    `top_k`: the teacher is its k likeliest tokens and one bucket for all others. They can be kept
    in the folder `cache`, at 6 bytes each: 64 of them are 384 bytes a token, 3.8 GB for 10M tokens.
    A run whose text is all there does not load the teacher.
    """

    kl: float = 1.0
    next_token: float = 0.0
    temperature: float = 1.0
    top_k: int | None = None
    cache: str | None = None


@dataclass(frozen=True)
class TuneConfig(StageConfig):
    """End to end, next-token cross entropy alone; needs no teacher."""


@dataclass(frozen=True)
class ExtendConfig(StageConfig):
    """End to end, next-token cross entropy, on documents longer than data.sequence_length.

    A row is `state_passing` segments of one document. They are read one after the other, each from
    the state in which the one before ended and without a gradient into it: back-propagation through
    time, truncated (Chen et al., arXiv 2410.07145v2). A step's gradient is that of the mean over
    all tokens of all rows.

    initial_state: what a row's first segment begins from (Buitrago & Gu, arXiv 2507.02782): "zero";
        "noise", Gaussian, as large as the states at the ends of rows are where the stage begins; or
        "carried", where the row in the same place of the step before ended. Layers that keep
        softmax attention hold tokens and not a state: they begin every row with nothing.
    """

    state_passing: int = 12
    initial_state: Literal["zero", "noise", "carried"] = "zero"

    @property
    def segments(self) -> int:
        return self.state_passing


STAGES = ("orient", "align", "distill", "tune", "extend")  # in the order in which they run
LAYERWISE = ("orient", "align")


@dataclass(frozen=True)
class BatchConfig:
    """A step sees size x accumulation x processes rows of data.sequence_length tokens, in the stage
    extend of state_passing times as many."""

    size: int = 8  # rows of one forward pass of one process
    accumulation: int = 1


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on the pretrained projections; what conversion added trains in full."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ()  # none: all projections of the attention


@dataclass(frozen=True)
class EvalConfig:
    """Held-out perplexity at the start, after calibration and every stage, and every `every` steps
    (0: not within a stage)."""

    every: int = 0
    tokens: int = 100_000


@dataclass(frozen=True)
class CheckpointConfig:
    """Full training state at the end and every `every` steps (0: at the end alone, or when it is
    interrupted); the last `keep` stay."""

    every: int = 500
    keep: int = 2


@dataclass(frozen=True)
class UptrainConfig:
    student: str  # the converted checkpoint
    out: str  # folder of the run
    data: DataConfig
    seed: int = 0
    teacher: str | None = None
    calibrate: CalibrateConfig = field(default_factory=CalibrateConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    orient: OrientConfig | None = None
    align: AlignConfig | None = None
    distill: DistillConfig | None = None
    tune: TuneConfig | None = None
    extend: ExtendConfig | None = None
    batch: BatchConfig = field(default_factory=BatchConfig)
    precision: Literal["bf16", "fp32"] = "bf16"  # bf16: autocast over float32 weights
    gradient_checkpointing: bool = False
    lora: LoraConfig | None = None
    trackers: tuple[str, ...] = ()  # names that accelerate's log_with knows
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    resume: bool = True  # continue from the last checkpoint in `out`, if there is one

    def __post_init__(self):
        check(self)

    @property
    def stages(self) -> dict[str, StageConfig]:
        """The stages that run, by name and in order."""
        return {name: stage for name in STAGES if (stage := getattr(self, name)) is not None}

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
