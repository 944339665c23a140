"""`supra inspect`."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import typer

from supra.cli.help import MODELS, Command
from supra.cli.options import Json, ModelArgument, flag, integers
from supra.cli.output import print_result
from supra.errors import UserError
from supra.uptrain import limits

app = typer.Typer()


@app.command(cls=Command, rich_help_panel=MODELS, epilog="supra inspect ./rnn --context 2048,32768")
def inspect(
    model: ModelArgument,
    context: Annotated[
        Sequence[int], integers("--context", "Lengths at which to size the state.", limits.TEXT)
    ] = (2048, 32768),
    verify: Annotated[
        bool, flag("--verify", "Read all tensors and compare their checksums.")
    ] = False,
    json: Json = False,
) -> None:
    """Show the layers, the parameters and the state size of a model."""
    from supra.checkpoint.opening import find_checkpoint
    from supra.conversion.inspection import inspect_model

    checkpoint = find_checkpoint(model)
    found = inspect_model(checkpoint.config(), context)
    if verify:
        from supra.checkpoint.checksums import verify as verified

        if checkpoint.gguf_file is not None:
            raise UserError("--verify needs a folder that supra wrote, not a GGUF file")
        checkpoint.fetch_weights()
        found = replace(found, verified=verified(checkpoint.folder))
    print_result(found, json)
