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
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from grid_rows import ROWS, TEXTS, Row

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
    result |= log_of(run) | measured(arguments, run.final)
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


def log_of(run: RunFolder) -> dict[str, Any]:
    """The time of training, and the held-out perplexity after each stage."""
    lines = [json.loads(text) for text in run.log.path.read_text().splitlines()]
    stages = {}
    for entry in lines:
        for key in ("teacher", "converted", "eval"):
            if f"{key}_perplexity" in entry:
                name = entry["stage"] if key == "eval" else key
                stages[name] = entry[f"{key}_perplexity"]
    seconds = round(run.log.training_seconds())
    return {"training_seconds": seconds, "perplexity_by_stage": stages}


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
