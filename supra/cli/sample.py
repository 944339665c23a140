"""`supra sample`."""

from pathlib import Path
from typing import Annotated

import typer

from supra.cli.arguments import parse_file
from supra.cli.help import RUN, Command
from supra.cli.options import (
    DeviceMap,
    Dtype,
    MaxMemory,
    Model,
    OffloadFolder,
    Seed,
    TextField,
    flag,
    number,
    option,
    string,
    whole,
)
from supra.errors import UserError
from supra.uptrain import limits

PREFIX_TOKENS = 32  # default

app = typer.Typer()


@app.command(
    cls=Command,
    rich_help_panel=RUN,
    epilog="supra sample --model ./teacher --tokens 1000000 --out text.jsonl",
)
def sample(
    model: Model,
    tokens: Annotated[
        int, whole("--tokens", "Tokens to write; the last record is written whole.", limits.TEXT)
    ],
    out: Annotated[
        Path, option("--out", "The .jsonl file to write; it must be new.", parse_file, "FILE")
    ],
    chat: Annotated[
        bool, flag("--chat", "Write chats of a question and an answer, with the chat template.")
    ] = False,
    prefixes: Annotated[
        str | None,
        string("--prefixes", "Continue the beginnings of these texts, as --text takes.", "FILE"),
    ] = None,
    prefix_tokens: Annotated[
        int | None,
        whole(
            "--prefix-tokens",
            f"Tokens of a beginning; shorter texts are left out. Default: {PREFIX_TOKENS}.",
            limits.PASS,
        ),
    ] = None,
    text_field: TextField = "text",
    length: Annotated[
        int,
        whole(
            "--length",
            "Tokens of a record at most: a text ends there, a chat that has not ended is left out.",
            limits.PASS,
        ),
    ] = 1024,
    temperature: Annotated[float, number("--temperature", "Of the tokens that are drawn.")] = 1.0,
    top_p: Annotated[
        float, number("--top-p", "Draw among the likeliest tokens of this probability together.")
    ] = 1.0,
    batch: Annotated[int, whole("--batch", "Records that are written at once.", limits.COUNT)] = 32,
    seed: Seed = 0,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    max_memory: MaxMemory = None,
    offload_folder: OffloadFolder = None,
) -> None:
    """Let a model write text to train on; the same command continues an interrupted one."""
    from supra.checkpoint.opening import find_checkpoint, parse_dtype
    from supra.checkpoint.placement import placement
    from supra.serving.sampling import sample as write
    from supra.serving.writers import Sampling

    if prefix_tokens is not None and prefixes is None:
        raise UserError(f"--prefix-tokens (={prefix_tokens}) is for --prefixes: give that too")
    settings = Sampling(
        tokens=tokens,
        batch=batch,
        length=length,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        chat=chat,
        prefixes=prefixes,
        prefix_tokens=prefix_tokens or PREFIX_TOKENS,
        text_field=text_field,
    )
    where = placement(device_map, max_memory, offload_folder)
    write(find_checkpoint(model, placement=where), out, settings, parse_dtype(dtype))
