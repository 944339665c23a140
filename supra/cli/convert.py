"""`supra convert`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from supra.cli.arguments import parse_integers
from supra.cli.help import MODELS, Command
from supra.cli.options import EXPORT_TARGETS, Dtype, Seed, choice, folder, number, string
from supra.errors import UserError, shown

app = typer.Typer()


@app.command(
    cls=Command,
    rich_help_panel=MODELS,
    epilog="supra convert --model HuggingFaceTB/SmolLM2-135M --mixer mamba2 --out ./rnn",
)
def convert(
    model: Annotated[str, string("--model", "Transformer: hub id, folder or GGUF file.", "MODEL")],
    out: Annotated[Path, folder("--out", "Folder to make for the converted model.")],
    mixer: Annotated[
        str | None,
        string(
            "--mixer",
            "Mixer in place of attention, e.g. gated or mamba2; a wrong name lists all. Default: "
            "gated_deltanet, or what --export-ready takes.",
            "NAME",
        ),
    ] = None,
    mixer_option: Annotated[
        list[str] | None,
        string(
            "--mixer-option",
            "Option of the mixer, e.g. conv_size=2; repeatable.",
            "NAME=VALUE",
        ),
    ] = None,
    export_ready: Annotated[
        str | None,
        choice(
            "--export-ready",
            f"Convert so that the model can be exported there: {' or '.join(EXPORT_TARGETS)}.",
            EXPORT_TARGETS,
            "TARGET",
        ),
    ] = None,
    keep_attention: Annotated[
        str,
        string(
            "--keep-attention",
            "Layers that keep softmax attention. Their numbers: 3,-1. A share, evenly spaced: 0.25 "
            "or 25%. The share whose conversion costs most on --text: auto:0.25, or with costs "
            "measured again after each choice: greedy:0.25.",
            "LAYERS",
        ),
    ] = "",
    attention_positions: Annotated[
        str,
        string(
            "--attention-positions",
            "Positions of the layers that keep attention: rope, as in the teacher, or none.",
            "NAME",
        ),
    ] = "rope",
    measured_text: Annotated[
        str | None,
        string(
            "--text",
            "Text on which --keep-attention auto and greedy measure costs: .txt, .jsonl or "
            ".parquet.",
            "FILE",
        ),
    ] = None,
    text_field: Annotated[
        str | None,
        string("--text-field", "Field that holds the text in a record. Default: text.", "FIELD"),
    ] = None,
    dtype: Dtype = None,
    revision: Annotated[
        str | None, string("--revision", "Revision of the hub id.", "REVISION")
    ] = None,
    seed: Seed = 0,
    shard_size: Annotated[
        float, number("--shard-size", "Largest size of a safetensors file, in GB.", "GB")
    ] = 4.0,
) -> None:
    """Turn a transformer into a recurrent network."""
    from supra.checkpoint.opening import parse_dtype
    from supra.conversion.convert import convert
    from supra.uptrain.memory import keep_freed_memory

    if text_field is not None and measured_text is None:
        raise UserError(f"--text-field (={text_field}) needs --text: give both")
    if not shard_size > 0:
        raise UserError(f"--shard-size (={shard_size}) must be above 0")
    keep_freed_memory()
    report = convert(
        model,
        out,
        mixer=mixer,
        options=parse_options(mixer_option or []),
        export_ready=export_ready,
        keep_attention=parse_layers(keep_attention),
        attention_positions=attention_positions,
        text=measured_text,
        text_field=text_field or "text",
        dtype=parse_dtype(dtype),
        seed=seed,
        shard_bytes=shard_size * 1e9,
        revision=revision,
        progress=True,
    )
    print("\n".join(report.lines()))
    print(f"wrote {out}; next: supra uptrain --config FILE student={out}")


def parse_options(pairs: list[str], option: str = "--mixer-option") -> dict[str, Any]:
    """`["decay=fixed", "scale=false"]` as a dict; values are read as YAML."""
    from supra.settings.yaml_text import parse_yaml

    options = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"{option} {shown(pair)} must be NAME=VALUE")
        if name in options:
            raise UserError(f"{option} {name} is given twice: keep one")
        options[name] = parse_yaml(value, f"{option} {shown(pair)}")
    return options


def parse_layers(text: str) -> list[int] | float | str:
    """`--keep-attention`, as `convert` takes it."""
    from supra.conversion.layer_choice import RULES, parse_share

    if text.startswith(RULES):
        return text
    if "." in text or "%" in text:
        return parse_share(text)
    return parse_integers("--keep-attention", text)
