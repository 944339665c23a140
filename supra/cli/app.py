"""The command `supra`: its commands, one file each, and what starts it.

A user's mistake is one line on stderr and exit code 2. Imports stand inside the commands, so that
`supra --help` answers at once.
"""

import os
import sys
from typing import Annotated

import typer

from supra import __version__
from supra.cli import (
    bench,
    convert,
    diagnose,
    evaluate,
    export,
    generate,
    init,
    inspect,
    plan,
    sample,
    serve,
    uptrain,
)
from supra.cli.help import Group
from supra.cli.mistakes import explain
from supra.cli.old_eval import renamed
from supra.cli.options import flag
from supra.errors import UserError, command

COMPLETION = "_SUPRA_COMPLETE"  # set by a shell that asks what can come next

app = typer.Typer(
    cls=Group,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="supra COMMAND --help shows the options of a command and an example. A model stands "
    "first, as in supra inspect ./rnn, or behind --model.",
)
for room in (
    convert,
    init,
    plan,
    uptrain,
    inspect,
    evaluate,
    diagnose,
    generate,
    sample,
    serve,
    export,
    bench,
):
    app.add_typer(room.app, rich_help_panel=room.app.rich_help_panel)


def show_version(asked: bool) -> None:
    if asked:
        print(f"supra {__version__}")
        raise typer.Exit


@app.callback()
def supra(
    version: Annotated[
        bool, flag("--version", "Show the version.", callback=show_version, is_eager=True)
    ] = False,
) -> None:
    """Turn pretrained transformers into recurrent networks with a state of fixed size."""


@command
def main(arguments: list[str] | None = None) -> None:
    """Run `supra` with these arguments; without any, with those of the process."""
    program = typer.main.get_command(app)
    if COMPLETION in os.environ:
        program.main(prog_name="supra")  # answers the shell, and exits
    arguments = renamed(sys.argv[1:] if arguments is None else arguments)
    try:
        # not program.main(), which would turn Ctrl-C and a full disk into endings of its own
        with program.make_context("supra", arguments or ["--help"]) as context:
            program.invoke(context)
    except typer.Exit as end:
        sys.exit(end.exit_code)
    except typer.TyperException as error:
        raise UserError(explain(error)) from None
