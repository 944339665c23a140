"""Can a recurrence count? Parity and sums modulo three, far beyond the trained length.

    python recipes/counting.py --tasks parity,modulo3 --seeds 0,1,2
    python recipes/counting.py --table      # writes all results into docs/counting.md

Every token of a row is 0 or 1. After each token, the answer is the number of ones so far, modulo
two or three. Rows have 4 to 24 tokens in training and 200 in the test. There are three recurrences
with states of equal size: gated linear attention; `nonlinear_gated` with weights below one, so that
it contracts; and `nonlinear_gated` with weights up to 2.4, with which an element of the state can
have two resting points. A model is trained with every learning rate, and the one that is best on
held-out rows of 24 tokens counts. Each seed gives one JSON file; existing files are kept.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from supra.bench.timing import processor
from supra.checkpoint.files import replace_between
from supra.cli.arguments import parse_names, parse_seeds
from supra.data.packing import IGNORE
from supra.errors import Diverged, UserError, check_choice, command
from supra.model.attention import attention_modules
from supra.testing import tiny_config, untrained_model
from supra.uptrain.small import fit, mean_loss
from supra.uptrain.stage_settings import OptimizerConfig

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results" / "counting", HERE.parent / "docs" / "counting.md"

TASKS = {"parity": 2, "modulo3": 3}
LINEAR = {"feature_map": "identity", "decay": "gated", "normalize": "none", "output_gate": True}
MIXERS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("supra", LINEAR),
    "contracting": ("nonlinear_gated", {"largest": 0.95, "solver": "sequential"}),
    "bistable": ("nonlinear_gated", {"largest": 2.4, "solver": "sequential"}),
}
SHORTEST, LONGEST, MEASURED = 4, 24, 200  # tokens
BUCKETS = (0, LONGEST, 50, 100, MEASURED)
GROWN = 0.5  # share of the training after which rows may have LONGEST tokens
STEPS, BATCH = 1000, 64
LR, NEW_RATES = 3e-3, (3e-3, 1e-2, 3e-2)  # for inherited parameters, and for new ones
ROWS = 256  # per measurement
HELD_OUT_SEED, MEASURED_SEED = 2**31, 2**31 + 1  # all models are measured on the same rows


@command
def main() -> None:
    arguments = build_parser().parse_args()
    if arguments.table:
        write_page()
        return
    seeds = parse_seeds(arguments.seeds)
    tasks, mixers = (
        parse_names("--tasks", arguments.tasks),
        parse_names("--mixers", arguments.mixers),
    )
    for name, values, known in (("task", tasks, TASKS), ("mixer", mixers, MIXERS)):
        for value in values:
            check_choice(name, value, known)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for task, mixer, seed in itertools.product(tasks or TASKS, mixers or MIXERS, seeds):
        file = RESULTS / f"{task}-{mixer}-{seed}.json"
        if file.exists() and not arguments.again:
            print(f"{file.name} exists: give --again to replace it")
            continue
        result = make(task, mixer, seed)
        file.write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {file.name}: {' | '.join(map(percent, kept(result)['accuracy']))}")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", default="", metavar="A,B", help=f"default: {', '.join(TASKS)}")
    parser.add_argument("--mixers", default="", metavar="A,B", help=f"default: {', '.join(MIXERS)}")
    parser.add_argument("--seeds", default="0,1,2", metavar="A,B")
    parser.add_argument("--again", action="store_true", help="replace existing results")
    parser.add_argument("--table", action="store_true", help="write the page from the results")
    return parser


def make(task: str, mixer: str, seed: int) -> dict[str, Any]:
    """Train and measure one seed with every learning rate."""
    return {
        "task": task,
        "mixer": mixer,
        "seed": seed,
        "options": MIXERS[mixer][1],
        "steps": STEPS,
        "lr": LR,
        "trials": [trial(task, mixer, seed, rate) for rate in NEW_RATES],
        "machine": processor("cpu"),
        "torch": torch.__version__,
    }


def trial(task: str, mixer: str, seed: int, rate: float) -> dict[str, Any]:
    start = time.monotonic()
    model = untrained(task, mixer, seed)
    failed = {}
    try:
        train(model, task, seed, rate, f"{task} {mixer} seed {seed} rate {rate}")
    except Diverged as error:  # the model is measured as it is
        failed = {"failed": str(error)}
    seconds = time.monotonic() - start
    held_out, loss = measure(model, TASKS[task], LONGEST, HELD_OUT_SEED)
    right, _ = measure(model, TASKS[task], MEASURED, MEASURED_SEED)
    return {
        "new_lr": rate,
        "held_out": held_out.mean().item(),
        "held_out_loss": loss,
        "accuracy": [right[begin:end].mean().item() for begin, end in pairwise(BUCKETS)],
        "training_seconds": round(seconds, 1),
    } | failed


def kept(result: dict[str, Any]) -> dict[str, Any]:
    """The trial with the most right answers on held-out rows of the trained length. A tie goes to
    the smallest loss there."""
    return max(result["trials"], key=lambda x: (x["held_out"], -x["held_out_loss"]))


def untrained(task: str, mixer: str, seed: int) -> nn.Module:
    """Two layers without rotary positions, with two heads of 8 × 8 each.

    At first, all heads forget half of the state at every token. The weights a start at random
    values within their bound. Conversion starts them at 0, which is furthest from the values that
    counting needs.
    """
    config = tiny_config(
        "smollm3",
        vocab_size=2 + TASKS[task],
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        no_rope_layers=[0, 0],
        initializer_range=32**-0.5,
    )
    model = untrained_model(config, *MIXERS[mixer], seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for attention in attention_modules(model):
        attention.mixer.decay_gate.set_half_life(torch.ones(config.num_attention_heads))
        if hasattr(attention.mixer, "recurrence"):
            largest = attention.mixer.options.largest
            attention.mixer.recurrence.data.uniform_(-largest, largest, generator=generator)
            attention.mixer.log_gain.data.zero_()  # keys and values of the same size in all models
    return model


def train(model: nn.Module, task: str, seed: int, rate: float, title: str) -> None:
    """Train on rows of at least 4 tokens, up to a maximum that grows to 24."""
    losses = training_losses(model, TASKS[task], torch.Generator().manual_seed(seed))
    rates = OptimizerConfig(lr=LR, new_lr=rate, weight_decay=0.01)
    fit(model, losses, STEPS, rates, title)


def training_losses(
    model: nn.Module, modulus: int, generator: torch.Generator
) -> Callable[[], Tensor]:
    steps = itertools.count()

    def next_loss() -> Tensor:
        share = min(1, next(steps) / (GROWN * STEPS))
        bound = SHORTEST + round((LONGEST - SHORTEST) * share)
        tokens = int(torch.randint(SHORTEST, bound + 1, (), generator=generator))
        return mean_loss(model, *draw_rows(modulus, BATCH, tokens, generator))

    return next_loss


def draw_rows(
    modulus: int, rows: int, tokens: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Bits and labels, int64 [N, T + 1]. The label for a bit is one position after it."""
    bits = torch.randint(2, (rows, tokens), generator=generator)
    answers = 2 + bits.cumsum(1) % modulus
    nothing = torch.full((rows, 1), IGNORE)
    return torch.cat([bits, bits[:, :1]], dim=1), torch.cat([nothing, answers], dim=1)


@torch.no_grad()
def measure(model: nn.Module, modulus: int, tokens: int, seed: int) -> tuple[Tensor, float]:
    """The share of right answers at each position [T], and the mean loss, on rows of this seed."""
    ids, labels = draw_rows(modulus, ROWS, tokens, torch.Generator().manual_seed(seed))
    logits = model.eval()(input_ids=ids[:, :-1], use_cache=False).logits
    right = (logits.argmax(-1) == labels[:, 1:]).float().mean(0)
    return right, nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()).item()


def write_page() -> None:
    """Write both tables from all results."""
    results = [json.loads(file.read_text()) for file in RESULTS.glob("*.json")]
    if not results:
        raise UserError(f"{RESULTS} has no results: run without --table first")
    groups = [
        sorted((x for x in results if (x["task"], x["mixer"]) == pair), key=lambda row: row["seed"])
        for pair in itertools.product(TASKS, MIXERS)
    ]
    lines = [*table(groups), "", *table_of_rates(groups)]
    replace_between(PAGE, "counting", "\n".join(lines))
    print(*lines, sep="\n")


def table(groups: list[list[dict[str, Any]]]) -> list[str]:
    """One line per task and recurrence, with all its seeds."""
    places = " | ".join(f"{begin} to {end - 1}" for begin, end in pairwise(BUCKETS))
    lines = [
        f"| task | recurrence | seeds | {places} | new_lr | seconds |",
        "| --- | --- | --- |" + " --- |" * len(BUCKETS) + " ---: |",
    ]
    for rows in filter(None, groups):
        best = [kept(row) for row in rows]
        by_place = zip(*(trial["accuracy"] for trial in best), strict=True)
        cells = [
            rows[0]["task"],
            rows[0]["mixer"],
            " / ".join(str(row["seed"]) for row in rows),
            *(" / ".join(map(percent, shares)) for shares in by_place),
            " / ".join(f"{x['new_lr']:g}" for x in best),
            f"{fmean(x['training_seconds'] for x in best):.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def table_of_rates(groups: list[list[dict[str, Any]]]) -> list[str]:
    """Accuracy with every learning rate, as means over seeds: on held-out rows, and at the end of
    long rows."""
    lines = [
        "| task | recurrence |" + "".join(f" {rate:g} |" for rate in NEW_RATES),
        "| --- | --- |" + " ---: |" * len(NEW_RATES),
    ]
    for rows in filter(None, groups):
        shown = [
            f"{percent(fmean(x['held_out'] for x in trials))}, "
            f"{percent(fmean(x['accuracy'][-1] for x in trials))}"
            for trials in zip(*(row["trials"] for row in rows), strict=True)
        ]
        lines.append(f"| {' | '.join([rows[0]['task'], rows[0]['mixer'], *shown])} |")
    return lines


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


if __name__ == "__main__":
    main()
