"""How the commands declare their options, and the options that several of them share."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from supra.cli.arguments import (
    parse_choice,
    parse_file,
    parse_folder,
    parse_integers,
    parse_memory,
    parse_names,
    parse_number,
    parse_text,
    parse_whole,
)
from supra.errors import UserError
from supra.uptrain import limits

DTYPES = ("float32", "bfloat16", "float16")
GGUF_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_k_m")
PLACEMENT = "A model larger than memory"
EXPORT_TARGETS = ("qwen3_5", "granite", "gguf")


def option(name: str, help: str, read: Callable[[str, str], Any], metavar: str, **more: Any) -> Any:
    """An option that takes a value, which read(name, text) returns or refuses with UserError."""

    def parse(value: Any) -> Any:
        if not isinstance(value, str):  # a default, which Typer passes through here too
            return value
        try:
            return read(name, value)
        except UserError as error:
            raise typer.BadParameter(str(error)) from None  # Typer would reword a ValueError

    return typer.Option(name, help=help, parser=parse, metavar=metavar, **more)


def string(name: str, help: str, metavar: str = "TEXT", **more: Any) -> Any:
    return option(name, help, parse_text, metavar, **more)


def whole(
    name: str, help: str, maximum: int, minimum: int | None = 1, metavar: str = "N", **more: Any
) -> Any:
    return option(
        name, help, partial(parse_whole, minimum=minimum, maximum=maximum), metavar, **more
    )


def integers(name: str, help: str, maximum: int, minimum: int | None = 1) -> Any:
    return option(name, help, partial(parse_integers, minimum=minimum, maximum=maximum), "A,B")


def number(name: str, help: str, metavar: str = "X") -> Any:
    return option(name, help, parse_number, metavar)


def names(name: str, help: str) -> Any:
    return option(name, help, parse_names, "A,B")


def choice(name: str, help: str, choices: tuple[str, ...], metavar: str, **more: Any) -> Any:
    def complete(incomplete: str) -> list[str]:
        return [x for x in choices if x.startswith(incomplete)]

    read = partial(parse_choice, choices=choices)
    return option(name, help, read, metavar, autocompletion=complete, **more)


def file(name: str, help: str, metavar: str = "FILE") -> Any:
    return option(name, help, parse_file, metavar)


def folder(name: str, help: str, **more: Any) -> Any:
    return option(name, help, parse_folder, "FOLDER", **more)


def flag(name: str, help: str, **more: Any) -> Any:
    return typer.Option(name, help=help, **more)


def argument(metavar: str, help: str) -> Any:
    return typer.Argument(help=help, parser=str, metavar=metavar)


MODEL_HELP = "Hub id, folder or GGUF file; converted or not."
Model = Annotated[str, string("--model", MODEL_HELP, "MODEL")]
ModelArgument = Annotated[str, argument("MODEL", MODEL_HELP)]
Text = Annotated[
    str, string("--text", "Text to read: .txt, .jsonl, .jsonl.gz or .parquet.", "FILE")
]
TextField = Annotated[
    str,
    string("--text-field", "Field that holds the text in a .jsonl or .parquet record.", "FIELD"),
]
Dtype = Annotated[
    str | None,
    choice(
        "--dtype", f"{', '.join(DTYPES)}. Default: the dtype of the model's file.", DTYPES, "DTYPE"
    ),
]
DeviceMap = Annotated[
    str | None,
    string(
        "--device-map",
        "Where the weights lie: auto fills the GPUs, then memory, then the disk; or one device, "
        "such as cpu. Default: the GPU if there is one.",
        "auto|DEVICE",
        rich_help_panel=PLACEMENT,
    ),
]
MaxMemory = Annotated[
    dict | None,
    option(
        "--max-memory",
        "Weights that a device holds at most, with --device-map auto: as cpu=8GB, or "
        "0=20GB,cpu=60GB with a GPU. Default: what is free.",
        parse_memory,
        "DEVICE=SIZE,…",
        rich_help_panel=PLACEMENT,
    ),
]
OffloadFolder = Annotated[
    Path | None,
    folder(
        "--offload-folder",
        "Folder for weights on the disk that have another form in the model's files.",
        rich_help_panel=PLACEMENT,
    ),
]
Seed = Annotated[int, whole("--seed", "Seed of all random choices.", limits.SEED, minimum=0)]
Json = Annotated[bool, flag("--json", "Print the result as JSON.")]
