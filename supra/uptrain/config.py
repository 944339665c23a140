"""Every setting of an uptraining run: the YAML file has the tree of these classes.

Defaults here, then the file, then `a.b=c` on the command line; see `supra.uptrain.tree`.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from supra.errors import UserError


@dataclass(frozen=True)
class LossConfig:
    """Per-token weights: next-token cross entropy, and KL(teacher || student) at a temperature."""

    next_token: float = 1.0
    kl: float = 0.0
    temperature: float = 1.0


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
    eval_path: str | None = None
    eval_split: str | None = None
    eval_documents: int = 0  # the first n documents are never trained on


@dataclass(frozen=True)
class CalibrateConfig:
    """Starting values of the mixers from the teacher's attention on the first tokens of the text,
    before the first step (supra/calibrate.py). 0: they stay what conversion wrote."""

    tokens: int = 0


@dataclass(frozen=True)
class BudgetConfig:
    """Tokens to train on: a number, or a share of the teacher's pretraining tokens.

    SUPRA's own budget is a share of about 0.05 (arXiv 2405.06640, abstract).
    """

    tokens: int | None = None
    share: float | None = None
    teacher_tokens: int | None = None

    @property
    def total(self) -> int:
        return self.tokens if self.share is None else math.ceil(self.share * self.teacher_tokens)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW. `new_lr` (default: `lr`) is the rate of what conversion added (`.mixer.` in the name).

    Parameters whose rate is 0 are frozen.
    """

    lr: float = 3e-4
    new_lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip: float = 1.0  # largest gradient norm; 0 turns clipping off


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over the run; `warmup` is a number of steps, or a share of them when < 1."""

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup: float = 0.05
    min_ratio: float = 0.1  # the last step's rate over the highest; cosine and wsd


@dataclass(frozen=True)
class BatchConfig:
    """A step sees size x accumulation x processes rows of data.sequence_length tokens."""

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
    """Held-out perplexity at the start, at the end and every `every` steps (0: not in between)."""

    every: int = 0
    tokens: int = 100_000


@dataclass(frozen=True)
class CheckpointConfig:
    """Full training state every `every` steps (0: only when interrupted); the last `keep` stay."""

    every: int = 500
    keep: int = 2


@dataclass(frozen=True)
class UptrainConfig:
    student: str  # the converted checkpoint
    out: str  # folder of the run
    data: DataConfig
    seed: int = 0
    teacher: str | None = None
    loss: LossConfig = field(default_factory=LossConfig)
    calibrate: CalibrateConfig = field(default_factory=CalibrateConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    precision: Literal["bf16", "fp32"] = "bf16"  # bf16: autocast over float32 weights
    gradient_checkpointing: bool = False
    lora: LoraConfig | None = None
    trackers: tuple[str, ...] = ()  # names that accelerate's log_with knows
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    resume: bool = True  # continue from the last checkpoint in `out`, if there is one

    def __post_init__(self):
        _check_ranges(self)
        _check_loss(self)
        _check_budget(self.budget)
        _check_held_out(self)


AT_LEAST = {
    "loss.next_token": 0,
    "loss.kl": 0,
    "calibrate.tokens": 0,
    "data.sequence_length": 2,
    "data.shuffle_buffer": 1,
    "data.eval_documents": 0,
    "optimizer.lr": 0,
    "optimizer.new_lr": 0,
    "optimizer.weight_decay": 0,
    "optimizer.clip": 0,
    "schedule.warmup": 0,
    "schedule.min_ratio": 0,
    "batch.size": 1,
    "batch.accumulation": 1,
    "lora.rank": 1,
    "eval.every": 0,
    "eval.tokens": 1,
    "checkpoint.every": 0,
    "checkpoint.keep": 1,
    "budget.tokens": 1,
    "budget.teacher_tokens": 1,
}
ABOVE_ZERO = ("loss.temperature", "lora.alpha")
# 0 or more, and less than this; seeds are numpy's
BELOW = {"seed": 2**32, "data.shuffle_seed": 2**32, "optimizer.betas": 1, "lora.dropout": 1}


def _check_ranges(config: UptrainConfig) -> None:
    for key, least in AT_LEAST.items():
        for value in _values(config, key):
            if not value >= least:
                raise UserError(f"{key} (={value}) must be >= {least}")
    for key in ABOVE_ZERO:
        for value in _values(config, key):
            if not value > 0:
                raise UserError(f"{key} (={value}) must be > 0")
    for key, bound in BELOW.items():
        for value in _values(config, key):
            if not 0 <= value < bound:
                raise UserError(f"{key} (={value}) must be >= 0 and < {bound}")
    if not config.schedule.min_ratio <= 1:
        raise UserError(f"schedule.min_ratio (={config.schedule.min_ratio}) must be <= 1")
    if config.optimizer.lr == 0 and not config.optimizer.new_lr:
        raise UserError("optimizer.lr (=0) trains nothing: set it or optimizer.new_lr above 0")


def _values(config: UptrainConfig, key: str) -> tuple[float, ...]:
    """The numbers of a setting; none where it is null or its section is."""
    value = config
    for name in key.split("."):
        value = getattr(value, name, None)
    if value is None:
        return ()
    return value if isinstance(value, tuple) else (value,)


def _check_loss(config: UptrainConfig) -> None:
    if config.loss.next_token == 0 and config.loss.kl == 0:
        raise UserError("loss.next_token and loss.kl are both 0: nothing would be learnt; set one")
    if config.loss.kl > 0 and config.teacher is None:
        raise UserError(f"loss.kl (={config.loss.kl}) needs a teacher: set teacher, or loss.kl=0")
    if config.teacher is not None and config.loss.kl == 0:
        raise UserError(f"teacher (={config.teacher}) is not used while loss.kl is 0: set loss.kl")


def _check_budget(budget: BudgetConfig) -> None:
    if (budget.tokens is None) == (budget.share is None):
        raise UserError("set exactly one of budget.tokens and budget.share")
    if budget.share is not None and not budget.share > 0:
        raise UserError(f"budget.share (={budget.share}) must be > 0")
    if budget.share is not None and budget.teacher_tokens is None:
        raise UserError(
            f"budget.share (={budget.share}) is a share of the teacher's pretraining tokens: "
            "set budget.teacher_tokens"
        )


def _check_held_out(config: UptrainConfig) -> None:
    data = config.data
    sources = [key for key in ("eval_path", "eval_split", "eval_documents") if getattr(data, key)]
    if len(sources) > 1:
        names = " and ".join(f"data.{key}" for key in sources)
        raise UserError(f"{names} are both set: the held-out text has one source; keep one")
    if data.eval_split == data.split:
        raise UserError(
            f"data.eval_split (={data.eval_split}) is the split that is trained on: name another"
        )
    if config.eval.every and not sources:
        raise UserError(
            f"eval.every (={config.eval.every}) needs held-out text: "
            "set data.eval_documents, data.eval_split or data.eval_path"
        )
