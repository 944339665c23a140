"""How much a state recalls, by its size: models that only differ in the size of their state.

    python recipes/capacity.py --heads 16,8,4,2,1 --seeds 0,1,2
    python recipes/capacity.py --table     # writes all results into docs/state_capacity.md

A row is filler with facts at random positions. A fact is a key and its value. At the end stand some
of the keys, and the answers are their values. A model is trained on rows of all lengths. It is then
tested on longer and longer rows, until fewer than 95% of its answers are right. Each model gives
one JSON file. The picture needs matplotlib.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from supra.bench.timing import processor
from supra.checkpoint.files import replace_between
from supra.cli.arguments import parse_integers, parse_seeds
from supra.data.packing import IGNORE, shifted_labels
from supra.errors import Diverged, UserError, command
from supra.evaluate.tasks.heat_map import need_matplotlib
from supra.model.attention import attention_modules
from supra.model.cache import new_cache
from supra.testing import tiny_config, untrained_model
from supra.uptrain.small import fit, mean_loss
from supra.uptrain.stage_settings import OptimizerConfig

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results" / "capacity", HERE.parent / "docs" / "state_capacity.md"

KEYS, VALUES, FILLERS = 64, 16, 16  # words of the language, in this order
ASKED = 32  # maximum number of questions per row
WIDTH, MIXER = 32, "mamba2"
MAX_FACTS = 64  # per row in training
LR, BATCH_WORDS = 1e-2, 2048
GROWN = 0.5  # share of the training after which rows may have MAX_FACTS facts
RECALLED = 0.95
LADDER = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 19, 22, 26, 30, 35, 41, 48, 56, 64)  # facts
TEST_ROWS = 256  # per number of facts


@dataclass(frozen=True)
class Law:
    """How capacity grows with the state: a law with two parameters, fitted by least squares."""

    name: str
    formula: str
    error: float  # root mean square, in facts
    at: Callable[[float], float]  # size of the state -> facts


@command
def main() -> None:
    arguments = build_parser().parse_args()
    if arguments.table:
        write_page()
        return
    heads = parse_integers("--heads", arguments.heads)
    seeds = parse_seeds(arguments.seeds)
    for count in heads:
        if count < 1 or WIDTH % count:
            raise UserError(f"--heads (={count}) must divide the width of {WIDTH}")
    if not heads:
        raise UserError("--heads must have at least one number, such as 16,4,1")
    if arguments.steps < 1:
        raise UserError(f"--steps (={arguments.steps}) must be at least 1")
    RESULTS.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        for count in heads:
            result = make(count, seed, arguments.steps)
            file = RESULTS / f"{count}-{seed}.json"
            file.write_text(json.dumps(result, indent=1) + "\n")
            print(f"wrote {file.name}", *table([result]), sep="\n")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", default="16,8,4,2,1", metavar="A,B", help="numbers of heads")
    parser.add_argument("--seeds", default="0,1,2", metavar="A,B")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--table", action="store_true", help="write the page from the results")
    return parser


def make(heads: int, seed: int, steps: int) -> dict[str, Any]:
    """Train and measure one model."""
    start = time.monotonic()
    model = untrained(heads, seed)
    result = {
        "heads": heads,
        "head_size": WIDTH // heads,
        "state": state_size(model),
        "parameters": sum(x.numel() for x in model.parameters()),
        "seed": seed,
        "steps": steps,
        "language": {"keys": KEYS, "values": VALUES, "fillers": FILLERS, "most": MAX_FACTS},
        "mixer": MIXER,
        "lr": LR,
        "batch_words": BATCH_WORDS,
        "machine": processor("cpu"),
        "torch": torch.__version__,
    }
    try:
        train(model, steps, seed)
    except Diverged as error:
        return result | {"failed": str(error)}
    curve = climb(lambda facts: recall(model, facts))
    capacity = crossing(curve)
    return result | {
        "curve": curve,
        "capacity": capacity,
        "length": None if capacity is None else round(context_length(capacity), 1),
        "minutes": round((time.monotonic() - start) / 60, 1),
    }


def untrained(heads: int, seed: int) -> torch.nn.Module:
    """One layer without rotary positions, whose convolutions start at random values, as in Mamba-2.

    Conversion starts convolutions as deltas. Then no gradient shows at first that a value should be
    stored under the word before it.
    """
    config = tiny_config(
        "smollm3",
        vocab_size=KEYS + VALUES + FILLERS,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=1,
        no_rope_layers=[0],
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=WIDTH // heads,
        initializer_range=WIDTH**-0.5,
    )
    model = untrained_model(config, MIXER, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for attention in attention_modules(model):
        taps = attention.mixer.conv.weight.data
        bound = taps.shape[1] ** -0.5
        taps.uniform_(-bound, bound, generator=generator)
    return model


def state_size(model: torch.nn.Module) -> int:
    """The number of elements in the state of one row, without the recent words of convolutions."""
    cache = new_cache(model.config.num_hidden_layers)
    model.eval()(input_ids=torch.zeros(1, 2, dtype=torch.long), past_key_values=cache)
    return sum(layer.state.memory.numel() for layer in cache.layers)


def context_length(facts: float) -> float:
    """The number of words before the questions: a third keys, a third values, a third filler."""
    return 3 * facts


def draw_rows(facts: int, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Words and labels, int64 [N, T]: filler with facts at random positions, then keys as
    questions.

    The facts of a row have different keys; values may repeat. The answer to a question is only a
    label, at the next position, where the next question stands. Answers are not part of the text.
    """
    keys = torch.rand(rows, KEYS, generator=generator).argsort(1)[:, :facts]
    values = KEYS + torch.randint(VALUES, (rows, facts), generator=generator)
    # 2 · facts slots: a fact takes one slot of two words, and a filler takes one slot of one word
    slots = torch.rand(rows, 2 * facts, generator=generator).argsort(1)[:, :facts].sort(1).values
    places = slots + torch.arange(facts)
    context = int(context_length(facts))
    ids = KEYS + VALUES + torch.randint(FILLERS, (rows, context), generator=generator)
    ids.scatter_(1, places, keys).scatter_(1, places + 1, values)
    asked = torch.rand(rows, facts, generator=generator).argsort(1)[:, : min(ASKED, facts)]
    last = torch.full((rows, 1), KEYS + VALUES)  # the position of the last label
    ids = torch.cat([ids, keys.gather(1, asked), last], dim=1)
    labels = torch.full_like(ids, IGNORE)
    labels[:, context + 1 :] = values.gather(1, asked)
    return ids, labels


def train(model: torch.nn.Module, steps: int, seed: int) -> None:
    """Train on rows of 2 facts up to a maximum that grows. The number of facts is uniform in its
    logarithm: rows of 2 to 4 facts are as frequent as rows of 32 to 64."""
    rates = OptimizerConfig(lr=LR, weight_decay=0.1)
    losses = training_losses(model, steps, torch.Generator().manual_seed(seed))
    title = f"{model.config.num_attention_heads} heads, seed {seed}"
    fit(model, losses.__next__, steps, rates, title)


def training_losses(
    model: torch.nn.Module, steps: int, generator: torch.Generator
) -> Iterator[Tensor]:
    for step in range(steps):
        share = min(1, step / (GROWN * steps))
        maximum = 4 * (MAX_FACTS / 4) ** share
        part = torch.rand((), generator=generator).item()
        facts = round(2 * (maximum / 2) ** part)
        rows = max(1, BATCH_WORDS // int(context_length(facts) + min(ASKED, facts)))
        yield mean_loss(model, *draw_rows(facts, rows, generator))


@torch.no_grad()
def recall(model: torch.nn.Module, facts: int) -> float:
    """The share of right answers, choosing among the values."""
    ids, labels = draw_rows(facts, TEST_ROWS, torch.Generator().manual_seed(facts))
    labels = shifted_labels(labels)
    hidden = model.eval().base_model(input_ids=ids, use_cache=False).last_hidden_state
    logits = model.get_output_embeddings()(hidden[labels != IGNORE])[:, KEYS : KEYS + VALUES]
    return (logits.argmax(-1) + KEYS == labels[labels != IGNORE]).float().mean().item()


def climb(measure: Callable[[int], float]) -> dict[int, float]:
    """The share of right answers for more and more facts, up to the first one below RECALLED."""
    curve = {}
    for facts in LADDER:
        curve[facts] = round(measure(facts), 5)
        if curve[facts] < RECALLED:
            break
    return curve


def crossing(curve: dict[int, float]) -> float | None:
    """The number of facts at which the share is RECALLED.

    Between two numbers of facts, the share is interpolated linearly in their logarithm. The result
    is 0 if already the first share is below RECALLED, and None if no share is.
    """
    if curve[max(curve)] >= RECALLED:
        return None
    if len(curve) == 1:
        return 0.0
    below, above = sorted(curve, reverse=True)[:2]
    part = (curve[above] - RECALLED) / (curve[above] - curve[below])
    return round(above * (below / above) ** part, 3)


def fit_laws(sizes: Sequence[float], capacities: Sequence[float]) -> list[Law]:
    """A linear, an exponential and a power law through the points, the best one first."""
    largest = max(sizes)
    slope, offset = statistics.linear_regression(sizes, capacities)
    # at the largest state, the exponential lies from 0.1% to 10^5 times above its tangent at 0
    bends = [0.001 * 10 ** (n / 500) for n in range(2100)]
    growth, bend = nearest(lambda x, size: math.expm1(x * size / largest), bends, sizes, capacities)
    powers = [n / 1000 for n in range(3000)]
    factor, power = nearest(lambda x, size: size**x, powers, sizes, capacities)
    found = [
        ("linear", f"{offset:.2f} + {slope:.4g} N", lambda size: offset + slope * size),
        (
            "exponential",
            f"{growth:.4g} ({math.exp(bend / largest):.6f}^N − 1)",
            lambda size: growth * math.expm1(bend * size / largest),
        ),
        ("power", f"{factor:.3g} N^{power:.3f}", lambda size: factor * size**power),
    ]
    laws = [
        Law(name, formula, distance([at(size) for size in sizes], capacities), at)
        for name, formula, at in found
    ]
    return sorted(laws, key=lambda law: law.error)


def nearest(
    shape: Callable[[float, float], float],
    bends: Sequence[float],
    sizes: Sequence[float],
    capacities: Sequence[float],
) -> tuple[float, float]:
    """The factor and the bend for which factor · shape(bend, size) has the smallest squared
    error."""

    def tried(bend: float) -> tuple[float, float, float]:
        shapes = [shape(bend, size) for size in sizes]
        products = sum(x * y for x, y in zip(shapes, capacities, strict=True))
        factor = products / sum(x * x for x in shapes)
        return distance([factor * x for x in shapes], capacities), factor, bend

    return min(map(tried, bends))[1:]


def distance(found: Sequence[float], wanted: Sequence[float]) -> float:
    """The root mean square of the differences."""
    return math.dist(found, wanted) / math.sqrt(len(wanted))


def write_page() -> None:
    """Write the table, the laws and the picture from all results."""
    need_matplotlib("--table: the page has a picture, which")
    results = [json.loads(file.read_text()) for file in RESULTS.glob("*.json")]
    results.sort(key=lambda x: (x["state"], x["seed"]))
    points = [(x["state"], x["capacity"]) for x in results if x.get("capacity") is not None]
    if len({size for size, _ in points}) < 3:
        raise UserError(
            f"{RESULTS} has results for fewer than three sizes of the state: run without --table "
            "first"
        )
    laws = fit_laws(*zip(*points, strict=True))
    pictures = PAGE.parent / PAGE.stem
    pictures.mkdir(exist_ok=True)
    draw(results, points, laws, pictures / "capacity.png")
    lines = [
        *table(results),
        "",
        "| law | facts recalled with N numbers in the state | root mean square error, facts |",
        "| --- | --- | ---: |",
        *(f"| {law.name} | {law.formula} | {law.error:.2f} |" for law in laws),
    ]
    text = "\n".join(lines)
    replace_between(PAGE, "capacity", text)
    print(text)


def table(results: list[dict[str, Any]]) -> list[str]:
    """One line for each size of the state, with all its seeds."""
    lines = [
        "| numbers in the state | heads | facts recalled | by seed | as words of context "
        "| numbers per fact | minutes |",
        "| ---: | --- | ---: | --- | ---: | ---: | ---: |",
    ]
    for state, rows in by_state(results).items():
        first, done = rows[0], [x for x in rows if x.get("capacity") is not None]
        seeds = " / ".join(f"{x['seed']}: {shown(x)}" for x in rows)
        mean = statistics.fmean(x["capacity"] for x in done) if done else math.nan
        minutes = statistics.fmean(x["minutes"] for x in done) if done else math.nan
        cells = [
            f"{state:,}",
            f"{first['heads']} of {first['head_size']} × {first['head_size']}",
            f"{mean:.1f}",
            seeds,
            f"{context_length(mean):.0f}",
            f"{state / mean:.0f}" if mean else "-",
            f"{minutes:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def shown(result: dict[str, Any]) -> str:
    """The capacity of one model."""
    if "failed" in result:
        return "diverged"
    capacity = result["capacity"]
    return f"over {LADDER[-1]}" if capacity is None else f"{capacity:.1f}"


def by_state(results: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    groups: dict[int, list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault(result["state"], []).append(result)
    return groups


def draw(
    results: list[dict[str, Any]], points: list[tuple[int, float]], laws: list[Law], file: Path
) -> None:
    """Draw accuracy by number of facts, and capacity by size of the state, with the laws."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (state, rows) in enumerate(by_state(results).items()):
        for index, row in enumerate(x for x in rows if "curve" in x):
            facts = [int(x) for x in row["curve"]]
            shares = [100 * x for x in row["curve"].values()]
            label = f"{state:,}" if index == 0 else None
            left.plot(facts, shares, color=f"C{number}", marker=".", linewidth=1, label=label)
    left.axhline(100 * RECALLED, color="gray", linestyle="--", linewidth=1)
    left.set_xscale("log", base=2)
    left.set(xlabel="facts in the row", ylabel="answers that are right, %", ylim=(88, 100.5))
    left.legend(title="numbers in the state", fontsize="small")
    right.scatter(*zip(*points, strict=True), color="black", zorder=3, s=16)
    largest = max(size for size, _ in points)
    sizes = [largest * (n + 1) / 200 for n in range(200)]
    for law in laws:
        label = f"{law.name}: off by {law.error:.2f}"
        right.plot(sizes, [law.at(size) for size in sizes], linewidth=1, label=label)
    right.set(
        xlabel="numbers in the state", ylabel=f"facts recalled at {RECALLED:.0%}", ylim=(0, None)
    )
    right.legend(fontsize="small")
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
