"""The command `supra`: convert | inspect | uptrain | eval | diagnose | generate | serve | bench.

A user's mistake is one line on stderr and exit code 2. Imports stand inside the commands, so that
`supra --help` answers at once.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from supra import __version__
from supra.checkpoint.json_files import to_json
from supra.cli.arguments import folder, parse_integers, parse_names
from supra.cli.bench import add_bench
from supra.errors import UserError, check_choice, command, shown
from supra.uptrain.limits import check_options


@command
def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and run one command."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["uptrain"]:  # its arguments are its own
        from supra.uptrain import main as uptrain

        uptrain(arguments[1:])
        return
    if arguments[:1] == ["serve"]:  # as those of transformers serve
        from supra.serving.http import serve

        serve(arguments[1:])
        return
    parsed = build_parser().parse_args(arguments)
    check_options(vars(parsed))
    parsed.run(parsed)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="supra", description="Transformers into recurrent nets.")
    parser.add_argument("--version", action="version", version=f"supra {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    add = commands.add_parser("convert", help="turn a transformer into a recurrent network")
    add.add_argument("--model", required=True, help="hub id, folder or GGUF file")
    add.add_argument("--out", required=True, type=folder, help="folder to make")
    add.add_argument(
        "--mixer", default="supra", help="supra, gated, mamba2, window …: see the README"
    )
    add.add_argument(
        "--mixer-option", action="append", default=[], metavar="NAME=VALUE",
        help="an option of the mixer, as feature_map=identity; may be repeated",
    )  # fmt: skip
    add.add_argument(
        "--keep-attention", default="", metavar="LAYERS",
        help="layers that stay softmax attention: 3,-1; a share, evenly spaced: 0.25 or 25%%; "
        "the share whose conversion costs most on --text: auto:0.25",
    )  # fmt: skip
    add.add_argument("--text", help="what auto measures costs on: .txt, .jsonl, .parquet")
    add.add_argument("--text-field", help="field of the text in a record; default text")
    add.add_argument("--dtype", help="float32, bfloat16 or float16; default: the model's own")
    add.add_argument("--revision", help="of a hub id")
    add.add_argument("--seed", type=int, default=0, help="of random starting values")
    add.add_argument(
        "--shard-size", type=float, default=4.0, metavar="GB", help="of a safetensors file"
    )
    add.set_defaults(run=run_convert)

    add = commands.add_parser("inspect", help="layers, parameters and state size of a model")
    add.add_argument("model", help="hub id, folder or GGUF file, converted or not")
    add.add_argument("--context", default="2048,32768", help="lengths at which to size the state")
    add.add_argument(
        "--verify", action="store_true", help="read all tensors and compare their checksums"
    )
    add.add_argument("--json", action="store_true", help="print JSON")
    add.set_defaults(run=run_inspect)

    # these two parse their own arguments
    commands.add_parser(
        "uptrain", add_help=False, help="train a converted model: --config FILE a.b=c"
    )
    commands.add_parser("serve", add_help=False, help="answer over HTTP: DIR --port 8000")

    add = commands.add_parser("eval", help="perplexity of a model on a text, by position too")
    add_model(add)
    add.add_argument("--text", help=".txt, .jsonl, .jsonl.gz or .parquet")
    add.add_argument("--text-field", help="field of the text in a record; default text")
    add.add_argument("--sequence-length", type=int, help="default 2048")
    add.add_argument(
        "--tokens", type=int, help="at most that many of the text; default: all, 8192 to ablate"
    )
    add.add_argument("--batch", type=int, help="rows at a time; default 4")
    add.add_argument(
        "--ablate", nargs="?", const="", metavar="A,B",
        help="diagnose the model: floors, layers, lookback, recall, labels, samples; default: all",
    )  # fmt: skip
    add.add_argument("--teacher", help="for --ablate: what the model was converted from")
    add.add_argument("--recall-lengths", metavar="A,B", help="for --ablate: tokens of prompts")
    add.add_argument(
        "--task",
        help="answers in rows of induction, associative-recall, mqar or recent-recall, or "
        "passkey: a number hidden in a text that is made up; reads no text",
    )
    add.add_argument(
        "--lengths", metavar="A,B", help="for --task: words of a row; of passkey, tokens of a text"
    )
    add.add_argument("--pairs", metavar="A,B", help="for --task mqar: keys that a row asks for")
    add.add_argument("--vocabulary", type=int, help="for --task: words of the language")
    add.add_argument(
        "--samples", type=int,
        help="for --task: rows of each length; default 256. Of passkey, of each depth too; 2",
    )  # fmt: skip
    add.add_argument("--depths", type=int, help="for --task passkey: rows of the grid; default 10")
    add.add_argument("--keys", type=int, help="for --task passkey: numbers in a text; default 1")
    add.add_argument("--picture", type=Path, metavar="PNG", help="for --task passkey: heat map")
    add.add_argument("--seed", type=int, default=0, help="of what --ablate and --task make up")
    add.add_argument("--json", action="store_true", help="print JSON")
    add.set_defaults(run=run_eval)

    add_diagnose(commands)

    add = commands.add_parser("generate", help="continue a prompt")
    add_model(add)
    add.add_argument("--prompt", required=True)
    add.add_argument("--max-new-tokens", type=int, default=100)
    add.add_argument("--chat", action="store_true", help="put the prompt into the chat template")
    add.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    add.add_argument("--top-p", type=float, default=1.0)
    add.add_argument("--beams", type=int, default=1)
    add.add_argument("--seed", type=int, default=0)
    add.set_defaults(run=run_generate)

    add = commands.add_parser("bench", help="measure kernels and solvers")
    add_bench(add.add_subparsers(required=True, metavar="what"))
    return parser


def add_diagnose(commands: Any) -> None:
    """`supra diagnose`."""
    add = commands.add_parser("diagnose", help="loss and states beyond the trained length")
    add.add_argument("model", help="converted: hub id, or folder")
    add.add_argument("--text", required=True, help=".txt, .jsonl, .jsonl.gz or .parquet")
    add.add_argument("--text-field", default="text", help="field of the text in a record")
    add.add_argument("--to", type=int, default=65536, help="tokens to read as one stream")
    add.add_argument(
        "--trained-length", type=int, metavar="TOKENS",
        help="of a row in training; default: what the run says that left the model",
    )  # fmt: skip
    add.add_argument("--chunk", type=int, default=1024, help="tokens of one forward pass")
    add.add_argument(
        "--every", type=int, metavar="TOKENS",
        help="from one look at the states to the next; default 1024, or less for short texts",
    )  # fmt: skip
    add.add_argument("--out", type=folder, help="folder to make: diagnosis.json and pictures")
    add.add_argument("--json", action="store_true", help="print JSON")
    add.add_argument(
        "--fix", metavar="auto",
        help="auto: try the cures that need no training; the best goes into config.json",
    )  # fmt: skip
    add.add_argument("--fix-text", help="what they are tried on; default: what follows in --text")
    add.add_argument(
        "--fix-to", type=int, metavar="TOKENS", help="of it; default: eight trained lengths"
    )
    add.add_argument("--dtype", help="float32, bfloat16 or float16; default: the model's own")
    add.set_defaults(run=run_diagnose)


def add_model(parser: argparse.ArgumentParser) -> None:
    """The model that a command runs."""
    parser.add_argument(
        "--model", required=True, help="hub id, folder or GGUF file, converted or not"
    )
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; default: the model's own")


def run_convert(arguments: argparse.Namespace) -> None:
    from supra.checkpoint.opening import parse_dtype
    from supra.conversion.convert import convert

    if arguments.text_field is not None and arguments.text is None:
        raise UserError(f"--text-field (={arguments.text_field}) is of --text: give both")
    report = convert(
        arguments.model,
        arguments.out,
        mixer=arguments.mixer,
        options=parse_options(arguments.mixer_option),
        keep_attention=parse_layers(arguments.keep_attention),
        text=arguments.text,
        text_field=arguments.text_field or "text",
        dtype=parse_dtype(arguments.dtype),
        seed=arguments.seed,
        shard_bytes=arguments.shard_size * 1e9,
        revision=arguments.revision,
        progress=True,
    )
    print("\n".join(report.lines()))
    print(f"wrote {arguments.out}; next: supra uptrain --config FILE student={arguments.out}")


def run_inspect(arguments: argparse.Namespace) -> None:
    from supra.checkpoint.opening import find_checkpoint
    from supra.conversion.inspection import inspect_model

    lengths = parse_integers("context", arguments.context)
    checkpoint = find_checkpoint(arguments.model)
    found = inspect_model(checkpoint.config(), lengths)
    if arguments.verify:
        from supra.checkpoint.checksums import verify

        if checkpoint.gguf_file is not None:
            raise UserError("--verify needs a folder that supra wrote, not a GGUF file")
        checkpoint.fetch_weights()
        found = replace(found, verified=verify(checkpoint.folder))
    print_result(found, arguments.json)


def run_eval(arguments: argparse.Namespace) -> None:
    from supra.checkpoint.opening import find_checkpoint, parse_dtype
    from supra.evaluate.ablate.ablation import diagnose
    from supra.evaluate.text_perplexity import evaluate_text

    check_eval(arguments)
    if arguments.task is not None:
        run_eval_task(arguments)
        return
    names = ("text_field", "sequence_length", "tokens", "batch")
    common = {name: x for name in names if (x := getattr(arguments, name)) is not None}
    common["dtype"] = parse_dtype(arguments.dtype)
    if arguments.ablate is None:
        result = evaluate_text(find_checkpoint(arguments.model), arguments.text, **common)
    else:
        given = {}
        if arguments.teacher is not None:
            given["teacher"] = find_checkpoint(arguments.teacher)
        if arguments.recall_lengths is not None:
            given["recall_lengths"] = parse_integers("recall-lengths", arguments.recall_lengths)
        result = diagnose(
            find_checkpoint(arguments.model),
            arguments.text,
            parts=parse_names(arguments.ablate),
            seed=arguments.seed,
            progress=True,
            **given,
            **common,
        )
    print_result(result, arguments.json)


def run_eval_task(arguments: argparse.Namespace) -> None:
    from supra.checkpoint.opening import find_checkpoint, parse_dtype
    from supra.data.synthetic import LANGUAGES
    from supra.evaluate.tasks.passkey import TASK, evaluate_passkey
    from supra.evaluate.tasks.task import evaluate_task

    check_choice("task", arguments.task, [*LANGUAGES, TASK])
    of_passkey, of_languages = ("depths", "keys", "picture"), ("pairs", "vocabulary")
    passkey = arguments.task == TASK
    for name in of_languages if passkey else of_passkey:
        if getattr(arguments, name) is not None:
            raise UserError(f"--{name} is not for --task {arguments.task}: leave it out")
    names = ("samples", *(of_passkey if passkey else of_languages))
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    for name in ("lengths", "pairs"):
        if (text := getattr(arguments, name)) is not None:
            given[name] = parse_integers(name, text)
    given |= {"seed": arguments.seed, "dtype": parse_dtype(arguments.dtype), "progress": True}
    checkpoint = find_checkpoint(arguments.model)
    if passkey:
        result = evaluate_passkey(checkpoint, **given)
    else:
        result = evaluate_task(checkpoint, arguments.task, **given)
    print_result(result, arguments.json)


def check_eval(arguments: argparse.Namespace) -> None:
    """Raise UserError for an option that the kind of evaluation has no use for."""
    for_task = ("lengths", "pairs", "vocabulary", "samples", "depths", "keys", "picture")
    for_ablate = ("teacher", "recall_lengths")
    of_text = ("text", "text_field", "sequence_length", "tokens", "batch")
    for_text = (*of_text, "ablate", *for_ablate)
    if arguments.task is None:
        refused = dict.fromkeys(for_task, "is for --task: give both")
        if arguments.text is None:
            raise UserError("--text is missing: what is the model to read? (or give --task)")
        if arguments.ablate is None:
            refused |= dict.fromkeys(for_ablate, "is for --ablate: give both")
    else:
        refused = dict.fromkeys(for_text, "is not for --task, which makes up its own text")
    for name, reason in refused.items():
        if getattr(arguments, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} {reason}")


def print_result(result: Any, as_json: bool) -> None:
    print(to_json(result.as_dict(), indent=1) if as_json else "\n".join(result.lines()))


def run_diagnose(arguments: argparse.Namespace) -> None:
    from supra.checkpoint.opening import find_checkpoint, parse_dtype
    from supra.long_context.diagnosis import diagnose

    names = ("text_field", "to", "trained_length", "chunk", "every", "out")
    names += ("fix", "fix_text", "fix_to")
    result = diagnose(
        find_checkpoint(arguments.model),
        arguments.text,
        dtype=parse_dtype(arguments.dtype),
        progress=True,
        **{name: getattr(arguments, name) for name in names},
    )
    print_result(result, arguments.json)


def run_generate(arguments: argparse.Namespace) -> None:
    from supra.checkpoint.opening import find_checkpoint, parse_dtype
    from supra.serving.generation import stream_text

    stream_text(
        find_checkpoint(arguments.model),
        arguments.prompt,
        chat=arguments.chat,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        beams=arguments.beams,
        seed=arguments.seed,
        dtype=parse_dtype(arguments.dtype),
    )


def parse_options(pairs: list[str]) -> dict[str, Any]:
    """`["decay=fixed", "scale=false"]` as a dict; values are read as YAML."""
    from supra.uptrain.tree import parse_yaml

    options = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"--mixer-option {shown(pair)} must be NAME=VALUE")
        if name in options:
            raise UserError(f"--mixer-option {name} is given twice: keep one")
        options[name] = parse_yaml(value, f"--mixer-option {shown(pair)}")
    return options


def parse_layers(text: str) -> list[int] | float | str:
    """`--keep-attention`, as `convert` takes it."""
    from supra.conversion.layer_choice import parse_share

    if text.startswith("auto"):
        return text
    if "." in text or "%" in text:
        return parse_share(text)
    return parse_integers("keep-attention", text)
