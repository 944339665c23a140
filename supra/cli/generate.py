"""`supra generate`."""

from typing import Annotated

import typer

from supra.cli.help import RUN, Command
from supra.cli.options import (
    DeviceMap,
    Dtype,
    MaxMemory,
    Model,
    OffloadFolder,
    Seed,
    flag,
    number,
    string,
    whole,
)
from supra.uptrain import limits

app = typer.Typer()


@app.command(
    cls=Command,
    rich_help_panel=RUN,
    epilog='supra generate --model ./rnn --prompt "The river" --max-new-tokens 50',
)
def generate(
    model: Model,
    prompt: Annotated[str, string("--prompt", "Text to continue.")],
    max_new_tokens: Annotated[
        int, whole("--max-new-tokens", "Tokens to write at most.", limits.COUNT)
    ] = 100,
    chat: Annotated[bool, flag("--chat", "Put the prompt into the chat template.")] = False,
    temperature: Annotated[
        float, number("--temperature", "0 takes the likeliest token; above 0 samples.")
    ] = 0.0,
    top_p: Annotated[
        float, number("--top-p", "Sample among the likeliest tokens of this probability together.")
    ] = 1.0,
    beams: Annotated[int, whole("--beams", "Beams of the search.", limits.BEAMS)] = 1,
    compile: Annotated[
        bool,
        flag("--compile", "Compile the step of one token. Takes a minute or more."),
    ] = False,
    seed: Seed = 0,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    max_memory: MaxMemory = None,
    offload_folder: OffloadFolder = None,
) -> None:
    """Continue a prompt."""
    from supra.checkpoint.opening import find_checkpoint, parse_dtype
    from supra.checkpoint.placement import placement
    from supra.serving.generation import stream_text

    where = placement(device_map, max_memory, offload_folder)
    stream_text(
        find_checkpoint(model, placement=where),
        prompt,
        chat=chat,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        beams=beams,
        compile=compile,
        seed=seed,
        dtype=parse_dtype(dtype),
    )
