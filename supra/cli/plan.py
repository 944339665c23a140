"""`supra plan`."""

from typing import Annotated

import typer

from supra.cli.convert import parse_layers, parse_options
from supra.cli.help import MODELS, Command
from supra.cli.options import Json, choice, flag, number, option, string, whole
from supra.cli.output import print_result
from supra.cli.uptrain import Overrides, Recipe
from supra.errors import UserError
from supra.planning.hardware import LAUNCHES, Gpus, Hardware, Rate, parse_gpus
from supra.uptrain import limits

app = typer.Typer()


@app.command(
    cls=Command,
    rich_help_panel=MODELS,
    epilog="supra plan --config supra --model HuggingFaceTB/SmolLM2-135M --mixer mamba2 "
    "--gpus 8x80GB",
)
def plan(
    config: Recipe,
    gpus: Annotated[
        Gpus,
        option(
            "--gpus", "GPUs of a machine and the memory of each, as 8x80GB.", parse_gpus, "NxSIZEGB"
        ),
    ],
    overrides: Overrides = None,
    model: Annotated[
        str | None,
        string("--model", "Transformer that is not converted yet, in place of student.", "MODEL"),
    ] = None,
    mixer: Annotated[
        str | None,
        string("--mixer", "Mixer that --model will have. Default: gated_deltanet.", "NAME"),
    ] = None,
    mixer_option: Annotated[
        list[str] | None,
        string("--mixer-option", "Option of the mixer; repeatable.", "NAME=VALUE"),
    ] = None,
    keep_attention: Annotated[
        str,
        string("--keep-attention", "Layers that will keep attention, as in convert.", "LAYERS"),
    ] = "",
    nodes: Annotated[int, whole("--nodes", "Machines with these GPUs.", limits.BEAMS)] = 1,
    launch: Annotated[
        str | None,
        choice(
            "--launch",
            f"File of recipes/launch: {', '.join(LAUNCHES)}. Default: ddp, or one_gpu for one GPU.",
            LAUNCHES,
            "NAME",
        ),
    ] = None,
    cp_size: Annotated[
        int, whole("--cp-size", "GPUs that have a part of each row.", limits.BEAMS)
    ] = 1,
    filled_cache: Annotated[
        bool,
        flag("--filled-cache", "All rows are in distill.cache, so that no teacher is loaded."),
    ] = False,
    simulate: Annotated[
        bool,
        flag("--simulate", "Also run a step without memory, and track what it would take."),
    ] = False,
    tflops: Annotated[
        float, number("--tflops", "Peak of one GPU in bf16, in 10^12 FLOPs a second.")
    ] = Rate.tflops,
    mfu: Annotated[float, number("--mfu", "Share of the peak that the run reaches.")] = Rate.mfu,
    price: Annotated[float | None, number("--price", "Price of one GPU for an hour.")] = None,
    json: Json = False,
) -> None:
    """Say what a run needs before it starts: memory, steps, hours, money."""
    from supra.mixers import DEFAULT_MIXER
    from supra.planning.plan import plan
    from supra.planning.settings import Conversion, find_models, read_settings

    launch = launch or ("ddp" if gpus.count * nodes > 1 else "one_gpu")
    hardware, rate = Hardware(gpus, nodes, launch, cp_size), Rate(tflops, mfu, price)
    conversion = None
    if model is not None:
        options = parse_options(mixer_option or [])
        conversion = Conversion(
            model, mixer or DEFAULT_MIXER, options, parse_layers(keep_attention)
        )
    elif mixer is not None or mixer_option or keep_attention:
        raise UserError(
            "--mixer, --mixer-option and --keep-attention are of a conversion: give --model, the "
            "transformer to convert"
        )
    settings = read_settings(config, overrides or [], conversion)
    models = find_models(settings, conversion, filled_cache)
    print_result(plan(settings, models, hardware, rate, simulate), json)
