"""A small model whose state collapses beyond its trained length, and cures for it.

    python recipes/collapse.py --seeds 0,1,2
    python recipes/collapse.py --seeds 0,1,2 --native   # with Mamba2ForCausalLM of transformers
    python recipes/collapse.py --table      # writes all results into docs/long_context.md

The language is recent-recall of supra.data.synthetic. A model is trained on rows in which nothing
has to be forgotten, and measured on rows of 16 times their length: as it is, with bounds on its
states, and after more training of several kinds. Each seed gives one JSON file. The pictures need
matplotlib.
"""

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

import supra
from supra.bench.timing import processor
from supra.checkpoint.files import replace_between
from supra.cli.arguments import parse_seeds
from supra.data.synthetic import RecentRecall, draw, labelled
from supra.errors import UserError, command
from supra.evaluate.tasks.heat_map import need_matplotlib
from supra.evaluate.tasks.recall import recall_hits
from supra.long_context import StatePolicy, use_policy
from supra.model.attention import attention_modules
from supra.model.cache import cache_name, detach
from supra.model.native.adapter import adopt, empty_cache
from supra.model.recurrent import mixers_of
from supra.testing import tiny_config, untrained_model
from supra.uptrain.small import fit, mean_loss
from supra.uptrain.stage_settings import OptimizerConfig

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results" / "collapse", HERE.parent / "docs" / "long_context.md"

LANGUAGE = RecentRecall()
OPERATION = 3  # words
TRAINED = LANGUAGE.length // OPERATION  # operations per row in training
LONG = replace(LANGUAGE, length=16 * LANGUAGE.length)
BUCKETS = (0, 20, 40, 80, 160, 320)  # operations before a question
FINE = 10  # operations per point of the curves

STEPS, BATCH, LR = 600, 24, 3e-3
NATIVE_STEPS = 1500  # without an MLP it learns more slowly
MORE_STEPS, MORE_LR = 300, 1e-3
SEGMENTS = 12  # for state passing
ROWS = 128  # per measurement
BATCH_TOKENS = 32 * LONG.length
# as published; without the normalisation, learning takes twice as many steps
MIXER, OPTIONS = "mamba2", {"activation": "silu", "normalize": "rms"}
SLOW = (1e-5, 1e-3)  # initial step sizes, with which half is forgotten in 70,000 to 700 words
WIDTH, HEADS, HEAD_SIZE, LAYERS = 64, 4, 32, 2
# what a native model is measured with: one cure of each kind, and the control
NATIVE_VARIANTS = (
    "base", f"window {LANGUAGE.length}", "norm", "norm, half of it", "decay_scale 0.99",
    f"rows of {LANGUAGE.length}", "state passing",
)  # fmt: skip
# by the marker of a table in the page: the start of its results' names
TABLES = {"collapse": "", "native collapse": "native-"}


@command
def main() -> None:
    arguments = build_parser().parse_args()
    if arguments.table:
        write_page()
        return
    seeds = parse_seeds(arguments.seeds)
    if arguments.checkpoint and len(seeds) > 1:
        raise UserError(f"--checkpoint saves one seed, not {len(seeds)}: give --seeds 0")
    RESULTS.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        result = make(seed, arguments.native, arguments.checkpoint)
        name = f"{TABLES['native collapse'] if arguments.native else ''}{seed}.json"
        (RESULTS / name).write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {name}", *table([result]), sep="\n")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2", metavar="A,B")
    parser.add_argument(
        "--native", action="store_true", help="train Mamba2ForCausalLM of transformers instead"
    )
    parser.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="also save the base model, in float16"
    )
    parser.add_argument("--table", action="store_true", help="write the page from the results")
    return parser


def make(seed: int, native: bool = False, checkpoint: Path | None = None) -> dict[str, Any]:
    """Train and measure one seed."""
    start = time.monotonic()
    model, steps = untrained(seed, native), NATIVE_STEPS if native else STEPS
    train(model, fresh_rows(model, LANGUAGE, BATCH, Random(f"{seed} base")), steps, LR)
    if checkpoint:
        # half the size; decays are float32 again when the model is loaded in float32
        copy.deepcopy(model).half().save_pretrained(checkpoint)
    norms = state_norms(model, draw(LONG, Random("norms"), ROWS))
    left, largest = kept(model), largest_norms(model)
    variants = {
        name: {"policy": policy and asdict(policy)} | measured(model, policy)
        for name, policy in policies(largest).items()
        if name in NATIVE_VARIANTS or not native
    }
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, losses in trainings(model, seed).items():
        if native and name not in NATIVE_VARIANTS:
            continue
        model.load_state_dict(weights)
        train(model, losses, MORE_STEPS, MORE_LR, name)
        variants[name] = {"steps": MORE_STEPS} | measured(model)
    return {
        "seed": seed,
        "language": asdict(LANGUAGE),
        "model": (
            {"class": type(model).__name__} if native else {"mixer": MIXER, "options": OPTIONS}
        )
        | {"steps": steps, "batch": BATCH, "lr": LR},
        "buckets": BUCKETS,
        "variants": variants,
        "kept": left,
        "largest_norms": largest,
        "growth": (norms / norms[0]).permute(1, 2, 0).tolist(),
        "machine": processor("cpu"),
        "torch": torch.__version__,
        "minutes": round((time.monotonic() - start) / 60, 1),
    }


def untrained(seed: int, native: bool = False) -> nn.Module:
    """Two layers without rotary positions, whose heads forget almost nothing at first.

    Every word has the same step Δ at first, and A = −1.
    """
    model = native_model(seed) if native else converted_model(seed)
    generator = torch.Generator().manual_seed(seed)
    low, high = (math.log(x) for x in SLOW)
    for layer in (adopt(model) or dict(enumerate(attention_modules(model)))).values():
        logs = low + (high - low) * torch.rand(HEADS, generator=generator)
        bias = logs.exp().expm1().log()  # the inverse of softplus
        if native:
            layer.dt_bias.data.copy_(bias)
            layer.in_proj.weight.data[-HEADS:] = 0  # the logits of Δ
            layer.A_log.data.zero_()
        else:
            layer.mixer.dt.set(bias)
    return model


def converted_model(seed: int) -> nn.Module:
    config = tiny_config(
        "smollm3",
        vocab_size=LANGUAGE.vocabulary,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        no_rope_layers=[0] * LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=HEAD_SIZE,
        initializer_range=WIDTH**-0.5,
    )
    return untrained_model(config, MIXER, OPTIONS, seed=seed)


def native_model(seed: int) -> nn.Module:
    """The same sizes in transformers' Mamba2ForCausalLM, which has no MLP between its layers."""
    config = tiny_config(
        "mamba2",
        vocab_size=LANGUAGE.vocabulary,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        expand=HEADS * HEAD_SIZE // WIDTH,
        num_heads=HEADS,
        head_dim=HEAD_SIZE,
        state_size=HEAD_SIZE,
        n_groups=HEADS,  # each head has its own B and C
        initializer_range=WIDTH**-0.5,
    )
    return supra.accelerate(untrained_model(config, None, seed=seed))


def train(
    model: nn.Module, losses: Iterator[Tensor], steps: int, lr: float, name: str = "base"
) -> None:
    fit(model, losses.__next__, steps, OptimizerConfig(lr=lr, weight_decay=0.1), name)


def fresh_rows(
    model: nn.Module, language: RecentRecall, batch: int, generator: Random
) -> Iterator[Tensor]:
    """Losses on rows that begin from an empty state."""
    while True:
        yield mean_loss(model, *labelled(draw(language, generator, batch)))


def passed_states(model: nn.Module, batch: int, generator: Random) -> Iterator[Tensor]:
    """Losses on the segments of long rows. A segment has the trained length, and begins with the
    state at the end of the previous one, into which no gradient flows."""
    long = replace(LANGUAGE, length=SEGMENTS * LANGUAGE.length)
    while True:
        cache = empty_cache(model)
        ids, labels = labelled(draw(long, generator, batch))
        for part in zip(ids.chunk(SEGMENTS, 1), labels.chunk(SEGMENTS, 1), strict=True):
            yield mean_loss(model, *part, **{cache_name(model): cache}, use_cache=True)
            detach(cache)


def policies(largest: list[list[float]]) -> dict[str, StatePolicy | None]:
    """Bounds on the states, by name; `largest` are norms by layer and head."""
    half = [[x / 2 for x in heads] for heads in largest]
    return {
        "base": None,
        f"window {LANGUAGE.length}": StatePolicy(window=LANGUAGE.length),
        f"window {LANGUAGE.length // 2}": StatePolicy(window=LANGUAGE.length // 2),
        "norm": StatePolicy(norm=largest, norm_every=1),
        "norm, half of it": StatePolicy(norm=half, norm_every=1),
        **{f"decay_scale {x}": StatePolicy(decay_scale=x) for x in (0.999, 0.99, 0.97)},
        "insert_scale 0.75": StatePolicy(insert_scale=0.75),
    }


def trainings(model: nn.Module, seed: int) -> dict[str, Iterator[Tensor]]:
    """Losses to train on, by name. All have the same number of tokens per step."""
    longer = replace(LANGUAGE, length=4 * LANGUAGE.length)
    return {
        f"rows of {LANGUAGE.length}": fresh_rows(model, LANGUAGE, BATCH, Random(f"{seed} same")),
        "state passing": passed_states(model, BATCH, Random(f"{seed} passing")),
        f"rows of {longer.length}": fresh_rows(model, longer, BATCH // 4, Random(f"{seed} longer")),
    }


def measured(model: nn.Module, policy: StatePolicy | None = None) -> dict[str, Any]:
    """Accuracy by the number of operations before the question, in BUCKETS and in steps of FINE."""
    rows = draw(LONG, Random("held out"), ROWS)
    with use_policy(model, policy):
        hits = recall_hits(model.eval(), rows, BATCH_TOKENS)[1].double()
    operations = torch.tensor([row.queries for row in rows]) // OPERATION

    def shares(edges: tuple[int, ...] | range) -> list[float]:
        inside = [(start <= operations) & (operations < end) for start, end in pairwise(edges)]
        return [round(hits[x].mean().item(), 5) for x in inside]

    return {
        "accuracy": shares(BUCKETS),
        "curve": shares(range(0, BUCKETS[-1] + FINE, FINE)),
    }


@torch.no_grad()
def kept(model: nn.Module) -> list[list[float]]:
    """The share of the first word that is left at the end of a row of the trained length, by layer
    and head."""
    mixers, logs = mixers_of(model).values(), []
    for mixer in mixers:
        mixer.watch = logs.append  # [B, T, H]
    ids, _ = labelled(draw(LANGUAGE, Random("norms"), ROWS))
    model.eval()(input_ids=ids, use_cache=False)
    for mixer in mixers:
        mixer.watch = None
    return [x.sum(1).exp().mean(0).tolist() for x in logs]


def largest_norms(model: nn.Module) -> list[list[float]]:
    """The largest norm of each head's state, by layer, over rows of the trained length and all of
    their operations."""
    norms = state_norms(model, draw(LANGUAGE, Random("norms"), ROWS), OPERATION, torch.amax)
    return norms.amax(0).tolist()


@torch.no_grad()
def state_norms(
    model: nn.Module,
    rows: list,
    every: int = LANGUAGE.length,
    over_rows: Callable[..., Tensor] = torch.mean,
) -> Tensor:
    """Frobenius norms of the states after every `every` words: [T / every, layers, heads]."""
    cache, found = empty_cache(model), []
    for ids in torch.tensor([row.ids for row in rows]).split(every, 1):
        model.eval()(input_ids=ids, **{cache_name(model): cache}, use_cache=True)
        norms = [layer.state.memory.norm(dim=(2, 3)) for layer in cache.layers]
        found.append(torch.stack([over_rows(x, dim=0) for x in norms]))
    return torch.stack(found)


def write_page() -> None:
    """Write the tables from all results, and the pictures from those of our own mixer."""
    found = {marker: read_results(start) for marker, start in TABLES.items()}
    if not found["collapse"]:
        raise UserError(f"{RESULTS} has no results: run without --table first")
    need_matplotlib("--table")
    pictures = PAGE.parent / PAGE.stem
    pictures.mkdir(exist_ok=True)
    draw_accuracy(found["collapse"], pictures / "collapse.png")
    draw_growth(found["collapse"], pictures / "growth.png")
    for marker, results in found.items():
        if results:
            text = "\n".join(table(results))
            replace_between(PAGE, marker, text)
            print(text)


def read_results(start: str) -> list[dict[str, Any]]:
    """The results of all seeds whose files have names of `start` and the seed."""
    return [json.loads(file.read_text()) for file in sorted(RESULTS.glob(f"{start}[0-9]*.json"))]


def table(results: list[dict[str, Any]]) -> list[str]:
    """Accuracy in %: means over seeds, and the last bucket of every seed."""
    buckets = [f"{start}-{end}" for start, end in pairwise(results[0]["buckets"])]
    seeds = " / ".join(str(result["seed"]) for result in results)
    lines = [
        f"| | {' | '.join(buckets)} | {buckets[-1]} of seed {seeds} |",
        f"| --- | {'---: | ' * len(buckets)}--- |",
    ]
    for name in results[0]["variants"]:
        found = [result["variants"][name]["accuracy"] for result in results]
        means = [f"{100 * statistics.mean(x):.1f}" for x in zip(*found, strict=True)]
        last = " / ".join(f"{100 * x[-1]:.1f}" for x in found)
        lines.append(f"| {name} | {' | '.join(means)} | {last} |")
    return lines


def draw_accuracy(results: list[dict[str, Any]], path: Path) -> None:
    """Draw accuracy by position: with bounds, with bounds that do not help, and after more
    training."""
    panels = {
        "bounds": ["base", "window 60", "norm", "norm, half of it", "decay_scale 0.99"],
        "bounds that do not help": [
            "base", "window 30", "decay_scale 0.97", "insert_scale 0.75",
        ],
        "300 more steps": ["base", "rows of 60", "state passing", "rows of 240"],
    }  # fmt: skip
    figure, axes = blank(13, 4, len(panels))
    for place, (title, names) in zip(axes, panels.items(), strict=True):
        for number, name in enumerate(names):
            curves = [result["variants"][name]["curve"] for result in results]
            at = [FINE * (n + 0.5) for n in range(len(curves[0]))]
            color = "black" if name == "base" else f"C{number - 1}"
            for curve in curves:
                place.plot(at, [100 * x for x in curve], color=color, alpha=0.2, linewidth=1)
            means = [100 * statistics.mean(x) for x in zip(*curves, strict=True)]
            place.plot(at, means, color=color, label=name)
        place.axvline(TRAINED, color="gray", linestyle="--", linewidth=1)
        place.set(xlabel="operations before the question", title=title, ylim=(0, 101))
        place.set_xscale("log", base=2)
        place.legend(fontsize="small", loc="lower left")
    axes[0].set_ylabel("right answers, %")
    figure.savefig(path, dpi=100)


def draw_growth(results: list[dict[str, Any]], path: Path) -> None:
    """Draw one heat map per seed: the norm of each head's state relative to the trained length."""
    figure, axes = blank(13, 3.5, len(results))
    growth = [torch.tensor(result["growth"]) for result in results]  # [layers, heads, times]
    largest = max(x.log2().abs().max().item() for x in growth)
    for place, result, ratios in zip(axes, results, growth, strict=True):
        layers, heads, times = ratios.shape
        image = place.imshow(
            ratios.flatten(0, 1).log2().tolist(),
            aspect="auto", cmap="RdBu_r", vmin=-largest, vmax=largest,
            extent=(0.5, times + 0.5, 0, 1),
        )  # fmt: skip
        names = [f"{layer}.{head}" for layer in range(layers) for head in range(heads)]
        place.set_yticks([1 - (n + 0.5) / len(names) for n in range(len(names))], names)
        place.set(xlabel="trained lengths read", title=f"seed {result['seed']}")
    axes[0].set_ylabel("layer.head")
    figure.colorbar(image, ax=axes, label="log2 of the norm's growth")
    figure.savefig(path, dpi=100)


def blank(width: float, height: float, columns: int) -> tuple[Any, list]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0].tolist()


if __name__ == "__main__":
    main()
