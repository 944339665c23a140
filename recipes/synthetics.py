"""Train a small model with any mixer on a synthetic language.

    python recipes/synthetics.py --task induction --mixer supra --steps 800 --seeds 0,1,2
    python recipes/synthetics.py --table      # writes all results into docs/synthetics.md

The model is an untrained Llama with two layers. It is converted, then trained on fresh rows, or,
with --pool, on a fixed set of rows. Each seed gives one JSON file in recipes/results/synthetics,
also if the training diverges.
"""

import argparse
import json
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from supra.bench.timing import processor
from supra.checkpoint.files import replace_between
from supra.cli.arguments import parse_seeds
from supra.data.synthetic import LANGUAGES, Example, Language, draw, labelled
from supra.errors import Diverged, UserError, check_choice, command
from supra.evaluate.tasks.recall import recall_accuracy
from supra.testing import future_gradient, tiny_config, untrained_model
from supra.uptrain.small import descend, mean_loss
from supra.uptrain.stage_settings import OptimizerConfig

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results" / "synthetics", HERE.parent / "docs" / "synthetics.md"
EVERY = 50  # steps between two evaluations on held-out rows
HELD_OUT = 512  # held-out rows; training rows equal one of them only by chance
SOLVED = 0.95
LONGER = (2, 4, 8)  # times the length
# The maximum gradient with respect to later words. The rounding of a float32 FFT is smaller.
LEAK = 1e-5
# H3's authors train on every token. In induction all tokens but the answer are random, so training
# only on the answers leaves out nothing but noise.
LOSSES = {
    "induction": "answers", "associative-recall": "all", "mqar": "answers",
    "recent-recall": "answers",
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """The settings of one training; None means the language's own value."""

    task: str
    mixer: str
    steps: int
    seed: int
    options: dict[str, Any] = field(default_factory=dict)
    lr: float = 2e-3
    new_lr: float | None = None  # for parameters that the mixer adds; None means lr
    loss: str | None = None
    batch: int = 64
    pool: int = 0
    length: int | None = None
    vocabulary: int | None = None
    pairs: int | None = None
    layers: int = 2
    width: int = 32
    heads: int = 1
    head_size: int | None = None

    def __post_init__(self):
        check_choice("task", self.task, LANGUAGES)
        check_choice("loss", self.loss_kind, ("answers", "all"))
        for name in ("steps", "batch", "layers", "width", "heads", "head_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} (={value}) must be at least 1")
        if self.pool < 0 or 0 < self.pool < self.batch:
            raise UserError(
                f"--pool (={self.pool}) must be 0, or at least the batch of {self.batch} rows"
            )
        if self.head_size is None and self.width % self.heads:
            raise UserError(
                f"--width (={self.width}) must be a multiple of --heads (={self.heads}), or give "
                "--head-size"
            )
        if not self.lr > 0:
            raise UserError(f"--lr (={self.lr}) must be positive")

    @property
    def loss_kind(self) -> str:
        return self.loss or LOSSES[self.task]

    @property
    def language(self) -> Language:
        kind = LANGUAGES[self.task]
        known = {x.name for x in fields(kind)}
        sizes = {name: getattr(self, name) for name in ("length", "vocabulary", "pairs")}
        sizes = {name: size for name, size in sizes.items() if size is not None}
        for name in set(sizes) - known:
            raise UserError(
                f"--{name} (={sizes[name]}) does not apply to {self.task}: leave it out"
            )
        return kind(**sizes)

    @property
    def changed(self) -> dict[str, Any]:
        """The mixer options and the settings that differ from their defaults."""
        named = ("task", "mixer", "steps", "seed", "options")
        others = {x.name: getattr(self, x.name) for x in fields(self) if x.name not in named}
        defaults = {x.name: x.default for x in fields(self)}
        return self.options | {k: v for k, v in others.items() if v != defaults[k]}

    @property
    def file_name(self) -> str:
        changed = [f"{name}={json.dumps(value)}" for name, value in self.changed.items()]
        name = "-".join([self.task, self.mixer, *changed, str(self.steps), str(self.seed)])
        return re.sub(r"[^\w.=-]", "", name) + ".json"


@command
def main() -> None:
    arguments = build_parser().parse_args()
    if arguments.table:
        write_table()
        return
    settings_of_seeds = read_settings(arguments)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for settings in settings_of_seeds:
        result = make(settings)
        (RESULTS / settings.file_name).write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {settings.file_name}: {line([result])}")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", help=", ".join(LANGUAGES))
    parser.add_argument("--mixer", help="a mixer of supra convert")
    parser.add_argument("--options", default="{}", metavar="JSON", help="options of the mixer")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seeds", default="0,1,2", metavar="A,B")
    parser.add_argument("--lr", type=float, help="default: 2e-3")
    parser.add_argument("--new-lr", type=float, help="rate of new parameters; default: lr")
    parser.add_argument("--loss", help="answers or all; default: all for associative-recall only")
    parser.add_argument("--batch", type=int, help="rows per step; default: 64")
    parser.add_argument(
        "--pool", type=int, help="train on this many fixed rows; default: fresh rows"
    )
    parser.add_argument("--length", type=int, help="words per row; default: the paper's")
    parser.add_argument("--vocabulary", type=int, help="default: the paper's")
    parser.add_argument("--pairs", type=int, help="pairs per row of mqar; default: 4")
    parser.add_argument("--layers", type=int, help="default: 2")
    parser.add_argument("--width", type=int, help="hidden size; default: 32; the MLP has 4 times")
    parser.add_argument("--heads", type=int, help="default: 1")
    parser.add_argument("--head-size", type=int, help="default: width / heads")
    parser.add_argument("--table", action="store_true", help="write the page from the results")
    return parser


def read_settings(arguments: argparse.Namespace) -> list[Settings]:
    """The settings of each seed. Raises UserError for arguments that do not fit."""
    for name in ("task", "mixer"):
        if getattr(arguments, name) is None:
            raise UserError(f"--{name} is missing")
    try:
        options = json.loads(arguments.options)
    except json.JSONDecodeError:
        options = None
    if not isinstance(options, dict):
        raise UserError(
            f"--options (={arguments.options}) must be a JSON object, such as "
            '\'{"decay": "none"}\''
        )
    seeds = parse_seeds(arguments.seeds)
    names = {x.name for x in fields(Settings)} - {"options"}
    given = {k: v for k, v in vars(arguments).items() if k in names and v is not None}
    return [Settings(**given, options=options, seed=seed) for seed in seeds]


def make(settings: Settings) -> dict[str, Any]:
    """Train one seed and measure it."""
    language = settings.language
    model = untrained_model(
        llama_config(settings, language), settings.mixer, settings.options, seed=settings.seed
    )
    check_causal(model, settings, language)
    result = {
        **asdict(settings),
        "changed": settings.changed,
        "loss": settings.loss_kind,
        "language": asdict(language),
        "chance": 1 / language.candidates,
        "parameters": sum(x.numel() for x in model.parameters()),
        "machine": processor("cpu"),
        "torch": torch.__version__,
    }
    start = time.monotonic()
    try:
        curve = train(model, settings, language)
    except Diverged as error:
        return result | {"failed": str(error)}
    seconds = time.monotonic() - start
    check_causal(model, settings, language)  # again, because a part may start at zero
    solved = [step for step, accuracy in curve.items() if accuracy >= SOLVED]
    return result | {
        "accuracy": curve[settings.steps],
        "steps_to_95": solved[0] if solved else None,
        "curve": curve,
        "by_length": by_length(model, language),
        "training_seconds": round(seconds, 1),
    }


def llama_config(settings: Settings, language: Language) -> Any:
    return tiny_config(
        "llama",
        vocab_size=language.vocabulary,
        hidden_size=settings.width,
        intermediate_size=4 * settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        head_dim=settings.head_size or settings.width // settings.heads,
        initializer_range=settings.width**-0.5,
    )


def check_causal(model: torch.nn.Module, settings: Settings, language: Language) -> None:
    """Raise UserError if an output depends on later words, because such a model would score
    100%."""
    leak = future_gradient(model, language.length)
    if not leak <= LEAK:
        raise UserError(
            f"{settings.mixer} is not causal: outputs change with later words ({leak=:.1e})"
        )


def train(model: torch.nn.Module, settings: Settings, language: Language) -> dict[int, float]:
    """Train the model. Returns the accuracy on held-out rows by step. Raises Diverged."""
    held_out = draw(language, Random("held out"), HELD_OUT)
    rates = OptimizerConfig(lr=settings.lr, new_lr=settings.new_lr, weight_decay=0.1)
    batches, curve = training_rows(settings, language), {}

    def next_loss() -> Tensor:
        return mean_loss(model, *labelled(next(batches), settings.loss_kind == "all"))

    steps = descend(model, next_loss, settings.steps, rates)
    title = f"{settings.mixer} seed {settings.seed}"
    bar = tqdm(steps, desc=title, total=settings.steps, unit="step")
    for step, loss in bar:
        if step % EVERY == 0 or step == settings.steps:
            curve[step] = accuracy(model, held_out)
            bar.set_postfix(loss=f"{loss:.3f}", held_out=f"{curve[step]:.3f}")
    return curve


def training_rows(settings: Settings, language: Language) -> Iterator[list[Example]]:
    """Endless batches."""
    generator = Random(f"{settings.seed} train")
    pool = draw(language, generator, settings.pool)
    while not pool:
        yield draw(language, generator, settings.batch)
    while True:
        generator.shuffle(pool)
        for start in range(0, len(pool) - settings.batch + 1, settings.batch):
            yield pool[start : start + settings.batch]


def accuracy(model: torch.nn.Module, rows: list[Example]) -> float:
    """The share of answers that are the most likely of all words."""
    return recall_accuracy(model.eval(), rows)[1]


def by_length(model: torch.nn.Module, language: Language) -> dict[int, float]:
    """Accuracy on longer held-out rows, by length."""
    found = {}
    for factor in LONGER:
        longer = replace(language, length=factor * language.length)
        rows = draw(longer, Random(f"held out {factor}"), HELD_OUT)
        found[longer.length] = accuracy(model, rows)
    return found


def write_table() -> None:
    groups: dict[str, list[dict[str, Any]]] = {}
    for file in RESULTS.glob("*.json"):
        of_all_seeds = file.stem.rpartition("-")[0]
        groups.setdefault(of_all_seeds, []).append(json.loads(file.read_text()))
    order = list(LANGUAGES)
    rows = sorted(
        groups.values(),
        key=lambda some: (order.index(some[0]["task"]), some[0]["steps"], -mean_accuracy(some)),
    )
    lines = [
        "| task | mixer | steps | seeds | accuracy, % | steps to 95% | at 2, 4, 8 times the length "
        "| chance, % | minutes |",
        "| --- | --- | ---: | --- | --- | --- | --- | ---: | ---: |",
        *map(line, rows),
    ]
    table = "\n".join(lines)
    replace_between(PAGE, "synthetics", table)
    print(table)


def mean_accuracy(rows: list[dict[str, Any]]) -> float:
    """The mean over seeds; a seed that diverged counts as 0."""
    return sum(row.get("accuracy", 0) for row in rows) / len(rows)


def line(rows: list[dict[str, Any]]) -> str:
    """The table's line for all seeds of one setting."""
    rows = sorted(rows, key=lambda row: row["seed"])
    first, done = rows[0], [row for row in rows if "failed" not in row]
    changed = [f"{name}={json.dumps(value)}" for name, value in first["changed"].items()]
    longer = [" ".join(f"{100 * x:.0f}" for x in row["by_length"].values()) for row in done]
    minutes = sum(row["training_seconds"] for row in done) / 60 / max(1, len(done))
    cells = [
        first["task"],
        ", ".join([first["mixer"], *changed]),
        str(first["steps"]),
        " / ".join(str(row["seed"]) for row in rows),
        " / ".join(
            "diverged" if row not in done else f"{100 * row['accuracy']:.1f}" for row in rows
        ),
        " / ".join(str(row["steps_to_95"] or "-") for row in done),
        " / ".join(longer),
        f"{100 * first['chance']:.1f}",
        f"{minutes:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
