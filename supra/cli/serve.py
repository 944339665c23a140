"""`supra serve`."""

from typing import Annotated

import typer

from supra.cli.help import RUN, Command
from supra.cli.options import argument

app = typer.Typer()


@app.command(
    cls=Command,
    rich_help_panel=RUN,
    epilog="supra serve ./rnn --port 8000",
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
def serve(
    context: typer.Context,
    model: Annotated[str, argument("MODEL", "Hub id or folder; converted or not.")],
) -> None:
    """Answer over HTTP.

    All further options go to `transformers serve`, whose --help explains them.
    """
    from supra.serving.http import serve

    serve(model, context.args)
