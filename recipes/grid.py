"""One row of the grid: convert a teacher, uptrain it, measure it, write ROW-TOKENS-SEED.json.

    python recipes/grid.py gated --teacher T --train corpus_train.jsonl.gz \\
        --held-out corpus_valid.jsonl.gz --tokens 300_000
    python recipes/grid_tables.py         # writes all results into docs/results.md

All rows train on the same tokens in the same order, 2048 or 1024 per step, and are measured on the
same windows of 1024 tokens. With --suite, a row is also measured on tasks that it was not trained
for (`supra eval suite`). An interrupted row continues where it stopped. A training that diverges
gives a row, too.
"""

import argparse
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from supra.bench.timing import processor
from supra.checkpoint.opening import find_checkpoint
from supra.conversion.convert import convert
from supra.data.blocks import blocks_from_text
from supra.data.text import open_documents
from supra.errors import Diverged, UserError, check_choice, command
from supra.evaluate import state_bytes
from supra.evaluate.ablate.floors import find_mixers, measure_floors
from supra.evaluate.suite.data import check_folder
from supra.evaluate.suite.parts import OWN, Settings, prepare_parts
from supra.evaluate.suite.suite import evaluate_suite
from supra.evaluate.text_perplexity import evaluate_text, position_edges
from supra.model.loading import load_model
from supra.uptrain import load_config, train
from supra.uptrain.config import UptrainConfig
from supra.uptrain.run_folder import RunFolder

HERE = Path(__file__).parent
RESULTS = HERE / "results"
CONTEXT, HELD_OUT_TOKENS, FLOORS_TOKENS = 1024, 65_536, 16_384
SUITE = Settings(shots=(0, 4, 16, 48), sequence_length=CONTEXT)
SUITE_PARTS = OWN
# for budgets of about a million tokens: many small steps
SMALL = {
    "data.sequence_length": CONTEXT,
    "data.eval_documents": 0,
    "batch.size": 2,
    "batch.accumulation": 1,
    "eval.every": 0,
    "eval.tokens": 16_384,
    "checkpoint.every": 50,
    "checkpoint.keep": 1,
}


@dataclass(frozen=True)
class Row:
    """What to convert to, the recipe, and its changes for these budgets."""

    mixer: str
    recipe: str
    options: dict[str, Any] = field(default_factory=dict)
    keep_attention: float | str | tuple[int, ...] = ()
    overrides: dict[str, Any] = field(default_factory=dict)
    texts: dict[str, float] = field(default_factory=dict)  # of TEXTS; by default --train alone
    student: str | None = None  # the row with the same student, if it was converted there

    def but(self, overrides: dict[str, Any] | None = None, **changes: Any) -> "Row":
        """This row with `changes`, and with `overrides` besides its own."""
        return replace(self, overrides=self.overrides | (overrides or {}), **changes)


# The published recipes have learning rates for 7B models and a thousand times as many steps. Rows
# use the rates that the same papers or their successors give for 100M to 1B parameters.
PAPER = {
    "tune.optimizer.lr": 3e-4,
    "tune.schedule.warmup": 0.1,
    "tune.schedule.min_ratio": 0.1,
}
STAGED = {
    "align.tokens": None, "align.share": 0.2, "align.schedule.warmup": 0.1,
    "distill.tokens": None, "distill.share": 0.8, "distill.optimizer.lr": 3e-4,
    "distill.schedule.kind": "cosine", "distill.schedule.warmup": 0.05,
}  # fmt: skip
# After 300k tokens, mamba2 has 2.20 times the teacher's perplexity with 2048 tokens per step, and
# 1.97 times with 1024. With end-to-end rates of 6e-4, 3e-4 and 2e-4 it is 2.51, 2.02 and 1.98
# times. A window starts so close to the teacher that training layer by layer gains little; with
# rates of 3e-5 and 1e-4 it reaches 1.22 and 1.12 times.
OURS = {
    "batch.size": 1, "calibrate.tokens": 4096,
    "align.schedule.warmup": 0.05, "distill.schedule.warmup": 0.05,
}  # fmt: skip
NEAR = OURS | {
    "batch.size": 2,
    "align.optimizer.lr": 1e-3, "align.optimizer.new_lr": 5e-3,
    "distill.optimizer.lr": 1e-4, "distill.optimizer.new_lr": 1e-3,
}  # fmt: skip
SLOWER = {"distill.optimizer.lr": 2e-4, "distill.optimizer.new_lr": 7e-4}
ALIGN_ALONE = {"align.share": 1.0, "distill": None}
NONLINEAR = (10, 20)  # layers
# what a row may train on: the option that gives the text, and whether it is rewritten as practice
# in recall
TEXTS = {
    "train": ("train", False),
    "train recall": ("train", True),
    "written": ("written", False),
    "written recall": ("written", True),
}
ROWS = {
    "teacher_tuned": Row("softmax", "supra_paper", overrides=PAPER | {"tune.optimizer.lr": 5e-5}),
    "supra_paper": Row("supra_paper", "supra_paper", overrides=PAPER),
    "t2r": Row("t2r", "t2r", overrides={"tune.schedule.warmup": 0.1}),
    "hedgehog": Row(
        "hedgehog",
        "hedgehog",
        overrides={"orient.schedule.warmup": 0.1, "tune.schedule.warmup": 0.1},
    ),
    "lolcats": Row("lolcats", "lolcats"),
    "radlads": Row(
        "gated_delta",
        "radlads",
        overrides=STAGED
        | {"tune.tokens": None, "tune.share": 0.1, "distill.share": 0.7}
        | {"tune.sequence_length": None, "tune.batch": {}, "distill.batch": {}},
    ),
    "mohawk": Row(
        "gated_delta",
        "mohawk",
        overrides=STAGED
        | {"orient.tokens": None, "orient.share": 0.05, "align.share": 0.1, "distill.share": 0.85},
    ),
    "supra": Row("supra", "supra", overrides=OURS),
    "gated": Row("gated", "supra", overrides=OURS),
    "gated_wide": Row("gated", "supra", {"expansion": 2}, overrides=OURS),
    "gated_delta": Row("gated_delta", "supra", overrides=OURS),
    "mamba2": Row("mamba2", "supra", overrides=OURS | SLOWER),
    "mamba2_granite": Row("mamba2", "supra", {"form": "granite"}, overrides=OURS | SLOWER),
    "gated_deltanet": Row("gated_deltanet", "supra", overrides=OURS | SLOWER),
    "kda": Row("kda", "supra", overrides=OURS | SLOWER),
    "rwkv": Row("rwkv", "supra", overrides=OURS),
    # H3 as published: attention in layers 1 and 1 + L/2, and states as large as the heads
    "h3": Row("h3", "supra", {"head_size": 8, "d_state": 8}, (1, 16), OURS),
    "window": Row("window", "supra", overrides=NEAR),
    "nonlinear": Row(
        "nonlinear_gated",
        "supra",
        keep_attention=tuple(x for x in range(30) if x not in NONLINEAR),
        overrides=NEAR,
    ),
    "hybrid_even": Row("window", "supra", keep_attention=0.25, overrides=NEAR),
    "hybrid_auto": Row("window", "supra", keep_attention="auto:0.25", overrides=NEAR),
    # for recipes/lost.py: one change each
    "gated_deltanet_align": Row("gated_deltanet", "supra", overrides=OURS | ALIGN_ALONE),
    "gated_deltanet_small": Row(
        "gated_deltanet", "supra", {"sign_pairs": False}, overrides=OURS | SLOWER
    ),
    "hybrid_auto_1": Row("window", "supra", {}, "auto:0.034", NEAR),
    "hybrid_auto_2": Row("window", "supra", {}, "auto:0.067", NEAR),
    "hybrid_auto_4": Row("window", "supra", {}, "auto:0.134", NEAR),
    "window_256": Row("window", "supra", {"size": 256}, overrides=NEAR),
    "window_1024": Row("window", "supra", {"size": 1024}, overrides=NEAR),
}
# the search for a recipe: each change by itself
KL_ALONE = {"distill.kl": 1.0, "distill.next_token": 0.0}
CHANGES = {
    "kl": {"overrides": KL_ALONE},
    "recall": {"texts": {"train": 0.5, "train recall": 0.5}},
    "written": {"texts": {"written": 1.0}},
    "written_kl": {"texts": {"written": 1.0}, "overrides": KL_ALONE},
    "written_recall_kl": {
        "texts": {"written": 0.5, "written recall": 0.5},
        "overrides": KL_ALONE,
    },
}
ROWS |= {
    f"{base}_{name}": ROWS[base].but(student=base, **change)
    for base in ("gated_deltanet", "window", "window_256", "hybrid_auto")
    for name, change in CHANGES.items()
}


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("row", nargs="?", help=", ".join(ROWS))
    parser.add_argument("--teacher", help="hub id, folder or GGUF file")
    parser.add_argument("--train", help="text to train on")
    parser.add_argument("--written", help="text that the teacher wrote (`supra sample`)")
    parser.add_argument("--held-out", help="text to measure on")
    parser.add_argument("--tokens", type=int, default=300_000, help="to train on; default 300_000")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs/grid"), help="for checkpoints")
    parser.add_argument("--suite", help="folder of evaluation sets: measure abilities, too")
    parser.add_argument(
        "--tasks",
        type=lambda names: names.split(","),
        default=SUITE_PARTS,
        help=f"parts of the suite; default {','.join(SUITE_PARTS)}",
    )
    parser.add_argument("--limit", type=int, help="items of each part of the suite; default all")
    arguments = parser.parse_args()
    check_choice("row", arguments.row, ROWS)
    row = ROWS[arguments.row]
    texts = sorted({TEXTS[name][0] for name in row.texts or ("train",)})
    for name in ("teacher", "held_out", *texts):
        if getattr(arguments, name) is None:
            raise UserError(f"--{name.replace('_', '-')} is missing: a row needs it")
    if arguments.suite:  # fail now, not after the training
        settings = replace(SUITE, limit=arguments.limit or SUITE.limit)
        prepare_parts(arguments.tasks, check_folder(arguments.suite), settings)
    result = make(row, arguments)
    RESULTS.mkdir(exist_ok=True)
    name = f"{arguments.row}-{arguments.tokens}-{arguments.seed}.json"
    (RESULTS / name).write_text(json.dumps(result, indent=1) + "\n")
    ended = result.get("failed") or f"{result['ratio']:.3f} times the teacher's perplexity"
    print(f"wrote {RESULTS.name}/{name}: {ended}")


def make(row: Row, arguments: argparse.Namespace) -> dict[str, Any]:
    """Make one row; an interrupted one continues where it stopped."""
    student = arguments.runs / f"{row.student or arguments.row}-{arguments.seed}"
    convert_teacher(row, arguments, student)
    out = arguments.runs / f"{arguments.row}-{arguments.tokens}-{arguments.seed}"
    config, run = config_of(row, arguments, student, out), RunFolder(out)
    result = {
        "row": arguments.row,
        "recipe": row.recipe,
        "mixer": row.mixer,
        "options": row.options,
        "softmax_layers": kept_layers(student),
        "overrides": row.overrides,
        "texts": row.texts,
        "tokens": arguments.tokens,
        "seed": arguments.seed,
        "machine": processor("cuda" if torch.cuda.is_available() else "cpu"),
        "torch": torch.__version__,
    }
    try:
        if run.final.exists():
            run.check_same(config)
        elif not train(config):
            raise UserError(f"{arguments.row} was interrupted: the same command continues")
    except Diverged as error:
        return result | {"failed": str(error)}
    result |= log_of(out) | measured(arguments, run.final)
    if arguments.suite:
        result |= {"suite": abilities(arguments, run.final), "suite_limit": arguments.limit}
    return result


def convert_teacher(row: Row, arguments: argparse.Namespace, student: Path) -> None:
    """Convert the teacher into the folder `student`, unless this was done before."""
    conversion = {
        "teacher": find_checkpoint(arguments.teacher).fingerprint(),
        "mixer": row.mixer,
        "options": row.options,
        "keep_attention": row.keep_attention,
    }
    keep_to(arguments.runs / f"{student.name}.json", conversion)
    if not student.exists():
        auto = isinstance(row.keep_attention, str)
        convert(
            arguments.teacher,
            student,
            mixer=row.mixer,
            options=row.options,
            keep_attention=row.keep_attention,
            text=(arguments.train or arguments.written) if auto else None,
            seed=arguments.seed,
            progress=True,
        )


def config_of(row: Row, arguments: argparse.Namespace, student: Path, out: Path) -> UptrainConfig:
    """The row's recipe with its changes."""
    file = HERE / "configs" / f"{row.recipe}.yaml"
    settings = SMALL | row.overrides | sources_of(row, arguments) | {
        "student": student,
        "out": out,
        "data.eval_path": arguments.held_out,
        "budget.share": None,
        "budget.tokens": arguments.tokens,
        "seed": arguments.seed,
        "data.shuffle_seed": arguments.seed,
    }  # fmt: skip
    stages = yaml.safe_load(file.read_text(encoding="utf-8")) | row.overrides
    if stages.get("distill"):
        settings["teacher"] = arguments.teacher
    overrides = [f"{key}={json.dumps(value, default=str)}" for key, value in settings.items()]
    return load_config(file, overrides)


def sources_of(row: Row, arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings of the row's training text."""
    if not row.texts:
        return {"data.path": arguments.train}
    sources = []
    for name, weight in row.texts.items():
        option, recall = TEXTS[name]
        sources.append({"path": getattr(arguments, option), "weight": weight, "recall": recall})
    return {"data.sources": sources}


def keep_to(file: Path, facts: dict[str, Any]) -> None:
    """Raise UserError if the files under --runs were made from other `facts`, which `file`
    keeps."""
    text = json.dumps(facts, indent=1) + "\n"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    elif file.read_text() != text:
        raise UserError(
            f"{file} says that the files there were made with other settings: give another --runs, "
            "or remove them"
        )


def kept_layers(student: Path) -> list[int]:
    layers = find_checkpoint(str(student)).config().supra["layers"]
    return [number for number, name in enumerate(layers) if name == "softmax"]


def log_of(out: Path) -> dict[str, Any]:
    """The wall time of training, and the held-out perplexity after each stage."""
    lines = [json.loads(text) for text in (out / "log.jsonl").read_text().splitlines()]
    steps = [entry for entry in lines if "tokens_per_second" in entry]
    before = [0, *(entry["tokens"] for entry in steps)]
    seconds = sum(
        (entry["tokens"] - earlier) / entry["tokens_per_second"]
        for entry, earlier in zip(steps, before, strict=False)
    )
    stages = {}
    for entry in lines:
        for key in ("teacher", "converted", "eval"):
            if f"{key}_perplexity" in entry:
                name = entry["stage"] if key == "eval" else key
                stages[name] = entry[f"{key}_perplexity"]
    return {"training_seconds": round(seconds), "perplexity_by_stage": stages}


def measured(arguments: argparse.Namespace, final: Path) -> dict[str, Any]:
    """Perplexity of the result and of the teacher on windows of CONTEXT."""
    known = arguments.runs / "teacher.json"
    if not known.exists():
        known.write_text(json.dumps(perplexity_of(arguments.teacher, arguments.held_out)))
    teacher = json.loads(known.read_text())
    if (teacher["model"], teacher["text"]) != (arguments.teacher, arguments.held_out):
        raise UserError(
            f"{known} has the perplexity of {teacher['model']} on {teacher['text']}: give another "
            "--runs, or remove it"
        )
    student = perplexity_of(str(final), arguments.held_out)
    config = find_checkpoint(str(final)).config()
    return {
        "teacher_perplexity": teacher["perplexity"],
        "perplexity": student["perplexity"],
        "ratio": student["perplexity"] / teacher["perplexity"],
        "excess_nats": student["loss"] - teacher["loss"],
        "by_position": student["by_position"],
        "teacher_by_position": teacher["by_position"],
        "state_bytes": state_bytes(config, CONTEXT, torch.bfloat16),
        "floors": floors_of(final, arguments.held_out),
    }


def perplexity_of(model: str, text: str) -> dict[str, Any]:
    checkpoint = find_checkpoint(model)
    result = evaluate_text(
        checkpoint, text, sequence_length=CONTEXT, tokens=HELD_OUT_TOKENS, dtype=torch.bfloat16
    )
    return result.as_dict()


def abilities(arguments: argparse.Namespace, final: Path) -> dict[str, dict[str, Any]]:
    """The measures of the suite, for the result and the teacher, and what is kept of each."""
    result = evaluate_suite(
        find_checkpoint(str(final)),
        arguments.suite,
        teacher=find_checkpoint(arguments.teacher),
        tasks=arguments.tasks,
        settings=replace(SUITE, limit=arguments.limit or SUITE.limit),
        dtype=torch.bfloat16,
        out=arguments.runs / "suite",
        progress=True,
    )
    return {
        title: {
            "kind": measure["kind"],
            "model": measure["model"]["value"],
            "teacher": measure["teacher"]["value"],
            "kept": measure["kept"],
            "kept_standard_error": measure["kept_standard_error"],
        }
        for title, measure in result.as_dict()["measures"].items()
    }


def floors_of(final: Path, text: str) -> list[dict[str, Any]]:
    """Perplexity with only one branch of the mixers; [] for mixers with a single branch."""
    checkpoint = find_checkpoint(str(final))
    model = load_model(checkpoint, torch.bfloat16)
    if not any(mixer.branches for mixer in find_mixers(model)):
        return []
    documents = open_documents(text, "text").epoch(0)
    blocks = blocks_from_text(checkpoint.tokenizer(), documents, CONTEXT, FLOORS_TOKENS)
    floors = measure_floors(model, blocks, position_edges(CONTEXT), batch_size=4)
    return [asdict(variant) for variant in floors.variants]


if __name__ == "__main__":
    main()
