"""`supra init`."""

from pathlib import Path
from typing import Annotated

import typer

from supra.cli.convert import parse_layers, parse_options
from supra.cli.help import MODELS, Command
from supra.cli.options import DTYPES, Seed, choice, folder, string

app = typer.Typer()


@app.command(
    cls=Command,
    rich_help_panel=MODELS,
    epilog="supra init --like HuggingFaceTB/SmolLM2-135M --mixer h3 --out ./h3",
)
def init(
    like: Annotated[
        str,
        string(
            "--like",
            "What the model is like: hub id, folder or GGUF file of a transformer, or its config "
            "alone as a .yaml or .json file. No weights are read.",
            "MODEL",
        ),
    ],
    out: Annotated[Path, folder("--out", "Folder to make for the new model.")],
    mixer: Annotated[
        str | None,
        string(
            "--mixer",
            "Mixer of the layers, e.g. h3 or mamba2; softmax makes the transformer itself; a wrong "
            "name lists all. Default: gated_deltanet.",
            "NAME",
        ),
    ] = None,
    mixer_option: Annotated[
        list[str] | None,
        string(
            "--mixer-option",
            "Option of the mixer, e.g. conv_size=2; repeatable. Default: as published.",
            "NAME=VALUE",
        ),
    ] = None,
    keep_attention: Annotated[
        str,
        string(
            "--keep-attention",
            "Layers with softmax attention. Their numbers: 1,-1. A share, evenly spaced: 0.25 or "
            "25%.",
            "LAYERS",
        ),
    ] = "",
    settings: Annotated[
        list[str] | None,
        string(
            "--set",
            "Field of the config that differs, e.g. num_hidden_layers=4; repeatable.",
            "NAME=VALUE",
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        string(
            "--tokenizer",
            "Hub id or folder whose tokenizer the model gets, with its vocabulary. Default: that "
            "of --like.",
            "MODEL",
        ),
    ] = None,
    dtype: Annotated[
        str, choice("--dtype", f"Dtype of the weights: {', '.join(DTYPES)}.", DTYPES, "DTYPE")
    ] = "float32",
    revision: Annotated[
        str | None, string("--revision", "Revision of the hub id --like.", "REVISION")
    ] = None,
    seed: Seed = 0,
) -> None:
    """Make an untrained model with any mixers, to train it from scratch."""
    from supra.checkpoint.opening import parse_dtype
    from supra.conversion.untrained import init

    report = init(
        like,
        out,
        mixer=mixer,
        options=parse_options(mixer_option or []),
        keep_attention=parse_layers(keep_attention),
        settings=parse_options(settings or [], "--set"),
        tokenizer=tokenizer,
        dtype=parse_dtype(dtype),
        seed=seed,
        revision=revision,
        progress=True,
    )
    print("\n".join(report.lines()))
    print(f"wrote {out}; next: supra uptrain --config pretrain student={out} data.path=FILE")
