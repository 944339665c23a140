"""`supra export`."""

from pathlib import Path
from typing import Annotated

import typer

from supra.cli.help import RUN, Command
from supra.cli.options import (
    EXPORT_TARGETS,
    Dtype,
    argument,
    choice,
    flag,
    folder,
    number,
    string,
)
from supra.errors import UserError

app = typer.Typer()


@app.command(
    cls=Command,
    rich_help_panel=RUN,
    epilog="supra export ./rnn --to qwen3_5 --idle-attention --out ./served",
)
def export(
    model: Annotated[str, argument("MODEL", "Converted model: hub id or folder.")],
    to: Annotated[
        str,
        choice("--to", f"Architecture: {' or '.join(EXPORT_TARGETS)}.", EXPORT_TARGETS, "TARGET"),
    ],
    out: Annotated[Path, folder("--out", "Folder to make for the exported model.")],
    idle_attention: Annotated[
        bool,
        flag(
            "--idle-attention",
            "Append an attention layer that changes nothing, which engines need in a model whose "
            "layers are all recurrent.",
        ),
    ] = False,
    dtype: Dtype = None,
    compared_text: Annotated[
        str | None,
        string("--text", "Text to compare logits on. Default: Python's manual.", "FILE"),
    ] = None,
    text_field: Annotated[
        str | None,
        string("--text-field", "Field that holds the text in a record. Default: text.", "FIELD"),
    ] = None,
    revision: Annotated[
        str | None, string("--revision", "Revision of the hub id.", "REVISION")
    ] = None,
    shard_size: Annotated[
        float, number("--shard-size", "Largest size of a safetensors file, in GB.", "GB")
    ] = 4.0,
) -> None:
    """Rewrite a converted model for engines that do not know supra."""
    from supra.checkpoint.opening import parse_dtype
    from supra.export.export import export

    if text_field is not None and compared_text is None:
        raise UserError(f"--text-field (={text_field}) needs --text: give both")
    if not shard_size > 0:
        raise UserError(f"--shard-size (={shard_size}) must be above 0")
    result = export(
        model,
        out,
        to=to,
        dtype=parse_dtype(dtype),
        idle_attention=idle_attention,
        text=compared_text,
        text_field=text_field or "text",
        shard_bytes=shard_size * 1e9,
        revision=revision,
        progress=True,
    )
    print("\n".join(result.lines()))
    print(f"wrote {out}; how engines serve it: docs/guides/serve_anywhere.md")
