"""`supra export`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from supra.cli.help import RUN, Command
from supra.cli.options import (
    EXPORT_TARGETS,
    GGUF_TYPES,
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
    out: Annotated[Path, folder("--out", "Folder, or GGUF file, to make for the exported model.")],
    idle_attention: Annotated[
        bool,
        flag(
            "--idle-attention",
            "Append an attention layer that changes nothing, which engines need in a model whose "
            "layers are all recurrent.",
        ),
    ] = False,
    dtype: Dtype = None,
    type: Annotated[
        str | None,
        choice(
            "--type", f"Of a GGUF file: {', '.join(GGUF_TYPES)}. Default: f16.", GGUF_TYPES, "TYPE"
        ),
    ] = None,
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
        float | None,
        number("--shard-size", "Largest size of a safetensors file, in GB. Default: 4.", "GB"),
    ] = None,
) -> None:
    """Rewrite a converted model for engines that do not know supra."""
    if text_field is not None and compared_text is None:
        raise UserError(f"--text-field (={text_field}) needs --text: give both")
    given = {
        "idle_attention": idle_attention,
        "text": compared_text,
        "text_field": text_field or "text",
        "revision": revision,
    }
    if to == "gguf":
        result = _export_gguf(model, out, type, dtype, shard_size, given)
    else:
        result = _export_folder(model, out, to, type, dtype, shard_size, given)
    print("\n".join(result.lines()))
    print(f"wrote {out}; how engines serve it: docs/guides/serve_anywhere.md")


def _export_gguf(
    model: str,
    out: Path,
    type: str | None,
    dtype: str | None,
    shard_size: float | None,
    given: dict[str, Any],
) -> Any:
    from supra.export.gguf.export import export_gguf

    for name, value in (("--dtype", dtype), ("--shard-size", shard_size)):
        if value is not None:
            raise UserError(f"{name} (={value}) is not for --to gguf: give --type")
    return export_gguf(model, out, type=type or "f16", **given)


def _export_folder(
    model: str,
    out: Path,
    to: str,
    type: str | None,
    dtype: str | None,
    shard_size: float | None,
    given: dict[str, Any],
) -> Any:
    from supra.checkpoint.opening import parse_dtype
    from supra.export.export import export

    if type is not None:
        raise UserError(f"--type (={type}) is for --to gguf: give --dtype")
    if shard_size is not None and not shard_size > 0:
        raise UserError(f"--shard-size (={shard_size}) must be above 0")
    shard_bytes = 4e9 if shard_size is None else shard_size * 1e9
    given |= {"dtype": parse_dtype(dtype), "shard_bytes": shard_bytes, "progress": True}
    return export(model, out, to=to, **given)
