"""`supra diagnose`."""

from pathlib import Path
from typing import Annotated

import typer

from supra.cli.help import MEASURE, Command
from supra.cli.options import (
    DeviceMap,
    Dtype,
    Json,
    MaxMemory,
    OffloadFolder,
    Text,
    TextField,
    argument,
    choice,
    folder,
    string,
    whole,
)
from supra.cli.output import print_result
from supra.uptrain import limits

CURES = "Cures"

app = typer.Typer()


@app.command(
    cls=Command,
    rich_help_panel=MEASURE,
    epilog="supra diagnose out/first/final --text corpus.jsonl --to 65536 --out diagnosis",
)
def diagnose(
    model: Annotated[str, argument("MODEL", "Recurrent model: hub id or folder.")],
    text: Text,
    text_field: TextField = "text",
    to: Annotated[
        int, whole("--to", "Tokens to read as one stream.", limits.STREAM, metavar="TOKENS")
    ] = 65536,
    trained_length: Annotated[
        int | None,
        whole(
            "--trained-length",
            "Tokens of a row in training. Default: as in the run whose folder holds the model.",
            limits.PASS,
            metavar="TOKENS",
        ),
    ] = None,
    chunk: Annotated[
        int, whole("--chunk", "Tokens of a forward pass.", limits.PASS, metavar="TOKENS")
    ] = 1024,
    every: Annotated[
        int | None,
        whole(
            "--every",
            "Tokens between two looks at the states. Default: 1024, or less for short texts.",
            limits.STREAM,
            metavar="TOKENS",
        ),
    ] = None,
    out: Annotated[
        Path | None, folder("--out", "Folder to make for diagnosis.json and pictures.")
    ] = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    max_memory: MaxMemory = None,
    offload_folder: OffloadFolder = None,
    json: Json = False,
    fix: Annotated[
        str | None,
        choice(
            "--fix",
            "Try the cures that need no training, and write the best into config.json.",
            ("auto",),
            "auto",
            rich_help_panel=CURES,
        ),
    ] = None,
    fix_text: Annotated[
        str | None,
        string(
            "--fix-text",
            "Text to try the cures on. Default: what follows in --text.",
            "FILE",
            rich_help_panel=CURES,
        ),
    ] = None,
    fix_to: Annotated[
        int | None,
        whole(
            "--fix-to",
            "Tokens to try them on. Default: eight trained lengths.",
            limits.STREAM,
            metavar="TOKENS",
            rich_help_panel=CURES,
        ),
    ] = None,
) -> None:
    """See what happens to loss and states beyond the trained length."""
    from supra.checkpoint.opening import find_checkpoint, parse_dtype
    from supra.checkpoint.placement import placement
    from supra.long_context.diagnosis import diagnose

    where = placement(device_map, max_memory, offload_folder)
    result = diagnose(
        find_checkpoint(model, placement=where),
        text,
        text_field=text_field,
        stream_length=to,
        trained_length=trained_length,
        chunk=chunk,
        every=every,
        out=out,
        fix=fix,
        fix_text=fix_text,
        fix_length=fix_to,
        dtype=parse_dtype(dtype),
        progress=True,
    )
    print_result(result, json)
