"""Small language models from scratch that differ in their mixers alone, on given text.

    python recipes/scratch.py --train corpus_train.jsonl.gz --held-out corpus_valid.jsonl.gz
    python recipes/scratch.py --table     # writes all results into docs/from_scratch.md

All models have the same number of parameters, because the MLPs of larger mixers are narrower, and
read the same tokens in the same order. Each row and seed gives one JSON file in
recipes/results/scratch. What is done is not done again, and an interrupted training continues.
"""

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from tokenizers import Tokenizer

from supra.bench.timing import processor
from supra.checkpoint.config_rules import meta_model
from supra.checkpoint.files import fingerprint, replace_between, staged_folder
from supra.checkpoint.opening import find_checkpoint
from supra.cli.arguments import parse_names, parse_seeds
from supra.conversion.untrained import init, untrained_options
from supra.data.text import local_files, open_documents
from supra.data.vocabulary import learn_tokenizer
from supra.errors import Diverged, UserError, check_choice, command
from supra.evaluate import state_bytes
from supra.evaluate.text_perplexity import evaluate_text
from supra.mixers import NEW_PARAMETERS
from supra.model.auto import converted_config
from supra.testing import tiny_config
from supra.uptrain import load_config, train
from supra.uptrain.run_folder import RunFolder

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results" / "scratch", HERE.parent / "docs" / "from_scratch.md"
# With the 49,152 words of a large model's tokenizer, nine tenths of such a small model would be
# embeddings. With bytes, a row would have few words. So a vocabulary is learnt from the text.
VOCABULARY = 4096
SIZES = {  # 2.7M parameters, and 0.8M of embeddings, which are also the head
    "model_type": "llama",
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
MLP_MATRICES = 3
SETTINGS = {  # of uptraining, where they differ from the recipe pretrain
    "data.sequence_length": 256,
    "data.eval_documents": 0,
    "batch.size": 16,
    "batch.accumulation": 1,
    "tune.schedule.warmup": 0.05,
    "precision": "fp32",
    "eval.every": 0,
    "eval.tokens": 16_384,
    "checkpoint.every": 100,
    "checkpoint.keep": 1,
}
HELD_OUT_TOKENS = 65_536


@dataclass(frozen=True)
class Row:
    """A mixer, whether two layers keep attention, and what its paper claims."""

    mixer: str
    hybrid: bool = False
    claim: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def attention(self) -> list[int]:
        """The layers with attention: the second, and the one half of the depth later."""
        return [1, 1 + SIZES["num_hidden_layers"] // 2] if self.hybrid else []


ROWS = {
    "softmax": Row("softmax"),
    "h3": Row("h3", True, "19.6 against 20.6 of softmax (125M parameters, 50B tokens)"),
    "mamba2": Row("mamba2", claim="better than softmax at equal work"),
    "gated_deltanet": Row("gated_deltanet", claim="better than Mamba-2"),
}


@command
def main() -> None:
    arguments = build_parser().parse_args()
    if arguments.table:
        write_table()
        return
    for name in ("train", "held_out"):
        if getattr(arguments, name) is None:
            raise UserError(f"--{name.replace('_', '-')} is missing: a row needs it")
    names, seeds = parse_names("--rows", arguments.rows), parse_seeds(arguments.seeds)
    for name in names:
        check_choice("row", name, ROWS)
    if arguments.tokens < 1 or not arguments.lr > 0:
        raise UserError(
            f"--tokens (={arguments.tokens}) must be at least 1, and --lr (={arguments.lr}) above 0"
        )
    RESULTS.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        for name in names:
            file = RESULTS / f"{name}-{arguments.tokens}-{seed}.json"
            if not file.exists():
                file.write_text(json.dumps(make(name, seed, arguments), indent=1) + "\n")
            print(*table([json.loads(file.read_text())])[2:], sep="\n")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", help="text to train on: .jsonl, .jsonl.gz, .txt or .parquet")
    parser.add_argument("--held-out", help="text to measure on")
    parser.add_argument("--rows", default=",".join(ROWS), metavar="A,B", help="default: all")
    parser.add_argument("--seeds", default="0,1,2", metavar="A,B")
    parser.add_argument("--tokens", type=int, default=2_000_000, help="of each model")
    parser.add_argument("--lr", type=float, default=2e-3, help="of all parameters")
    parser.add_argument("--runs", type=Path, default=Path("runs/scratch"), help="for checkpoints")
    parser.add_argument("--table", action="store_true", help="write the page from the results")
    return parser


def make(name: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Make, train and measure one model."""
    row, runs = ROWS[name], arguments.runs / text_digest(arguments.train)
    tokenizer = runs / "tokenizer"
    if not tokenizer.exists():
        learn_vocabulary(arguments.train, tokenizer)
    sizes = equal_sizes(row, words_of(tokenizer))
    model, out = runs / f"{name}-{seed}", runs / f"{name}-{arguments.tokens}-{arguments.lr}-{seed}"
    if not model.exists():
        config = runs / f"{name}.json"
        config.write_text(json.dumps(sizes))
        init(
            config, model, mixer=row.mixer, options=row.options, keep_attention=row.attention,
            tokenizer=tokenizer, seed=seed,
        )  # fmt: skip
    result = {
        "row": name,
        "seed": seed,
        "tokens": arguments.tokens,
        "lr": arguments.lr,
        "attention": row.attention,
        "sizes": sizes,
        "vocabulary": sizes["vocab_size"],
        "parameters": count(row, sizes),
        "mixer_parameters": count(row, sizes, NEW_PARAMETERS),
        "machine": processor("cuda" if torch.cuda.is_available() else "cpu"),
        "torch": torch.__version__,
    }
    try:
        config = config_of(model, out, seed, arguments)
        if not (out / "final").exists() and not train(config):
            raise UserError(f"{name} was interrupted: the same command continues")
    except Diverged as error:
        return result | {"failed": str(error)}
    return result | measured(out, arguments.held_out)


def text_digest(text: str) -> str:
    """Models of another text do not share a folder."""
    return fingerprint(local_files(text))[:8]


def learn_vocabulary(text: str, folder: Path) -> None:
    """Write a tokenizer whose words are learnt from the text."""
    tokenizer = learn_tokenizer(open_documents(text, "text").epoch(0), VOCABULARY)
    with staged_folder(folder) as staging:
        tokenizer.save_pretrained(staging)


def words_of(folder: Path) -> int:
    return Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()


def equal_sizes(row: Row, vocabulary: int) -> dict[str, Any]:
    """The config's fields, with MLPs as wide as makes the model as large as softmax's."""
    sizes = SIZES | {"vocab_size": vocabulary}
    more = count(row, sizes) - count(ROWS["softmax"], sizes)
    unit = MLP_MATRICES * sizes["hidden_size"] * sizes["num_hidden_layers"]
    return sizes | {"intermediate_size": sizes["intermediate_size"] - round(more / unit)}


def count(row: Row, sizes: dict[str, Any], part: str = "") -> int:
    """Parameters whose names have `part`; the embeddings count once."""
    config = tiny_config("llama", **{name: x for name, x in sizes.items() if name != "model_type"})
    mixer, options = untrained_options(row.mixer, row.options)
    layers = [mixer] * config.num_hidden_layers
    for layer in row.attention:
        layers[layer] = "softmax"
    model = meta_model(converted_config(config, layers, {mixer: options}))
    return sum(x.numel() for name, x in model.named_parameters() if part in name)


def config_of(model: Path, out: Path, seed: int, arguments: argparse.Namespace) -> Any:
    """The recipe `pretrain` at this size."""
    settings = SETTINGS | {
        "student": model,
        "out": out,
        "data.path": arguments.train,
        "data.eval_path": arguments.held_out,
        "budget.tokens": arguments.tokens,
        "tune.optimizer.lr": arguments.lr,
        "seed": seed,
        "data.shuffle_seed": seed,
    }
    overrides = [f"{key}={json.dumps(value, default=str)}" for key, value in settings.items()]
    return load_config(HERE / "configs" / "pretrain.yaml", overrides)


def measured(out: Path, held_out: str) -> dict[str, Any]:
    """Held-out loss and perplexity, the size of the state, and the time of the training."""
    checkpoint, length = find_checkpoint(str(out / "final")), SETTINGS["data.sequence_length"]
    found = evaluate_text(
        checkpoint, held_out, sequence_length=length, tokens=HELD_OUT_TOKENS, batch=16
    )
    return {
        "loss": found.loss,
        "perplexity": found.perplexity,
        "by_position": found.by_position,
        "state_bytes": state_bytes(checkpoint.config(), length),
        "training_seconds": round(RunFolder(out).log.training_seconds()),
    }


def write_table() -> None:
    rows = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("*.json"))]
    lines = table(rows)
    replace_between(PAGE, "from scratch", "\n".join(lines))
    print("\n".join(lines))


def table(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each row and budget, with all seeds."""
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda x: (x["tokens"], list(ROWS).index(x["row"]), x["seed"])):
        groups.setdefault((row["tokens"], row["row"]), []).append(row)
    context = SETTINGS["data.sequence_length"]
    return [
        "| model | tokens | parameters | in mixers | perplexity, by seed | mean | state at "
        f"{context} | minutes | what its paper claims |",
        "| --- | ---: | ---: | ---: | --- | ---: | ---: | ---: | --- |",
        *map(line, groups.values()),
    ]


def line(rows: list[dict[str, Any]]) -> str:
    """All seeds of one row."""
    first, done = rows[0], [row for row in rows if "failed" not in row]
    kept = first["attention"]
    with_attention = f", attention in {' and '.join(map(str, kept))}" if kept else ""
    cells = [
        first["row"] + with_attention,
        f"{first['tokens']:,}",
        f"{first['parameters']:,}",
        f"{first['mixer_parameters']:,}",
        " / ".join(f"{x['perplexity']:.2f}" if x in done else "diverged" for x in rows),
        f"{fmean(x['perplexity'] for x in done):.2f}" if done else "—",
        f"{done[0]['state_bytes'] / 1e6:.2f} MB" if done else "—",
        f"{fmean(x['training_seconds'] for x in done) / 60:.0f}" if done else "—",
        ROWS[first["row"]].claim or "—",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
