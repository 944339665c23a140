"""`supra uptrain`, `python -m supra.uptrain` and `python recipes/uptrain.py`: one parser."""

import json
from typing import Annotated, Any

import typer

from supra.cli.help import MODELS, Command, write_lines
from supra.cli.options import flag, string

STOPPED = 130  # exit code of a run that was stopped before its end, as shells have it

app = typer.Typer()


class UptrainCommand(Command):
    """Its help also lists the recipes and all settings."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        from supra.uptrain import outline, shipped

        super().format_epilog(ctx, formatter)
        write_lines(formatter, "Recipes that come with supra", [", ".join(shipped.names())])
        files = ",".join(sorted(file.stem for file in shipped.LAUNCH.iterdir()))
        launch = "Files for accelerate launch --config_file"
        write_lines(formatter, launch, [f"{shipped.LAUNCH}/{{{files}}}.yaml"])
        formatter.write(f"\nSettings and their defaults:\n{outline()}\n")


def recipes(incomplete: str) -> list[str]:
    """For a shell that completes --config."""
    from supra.uptrain import shipped

    return [name for name in shipped.names() if name.startswith(incomplete)]


def show_schema(asked: bool) -> None:
    if asked:
        from supra.uptrain import schema

        print(json.dumps(schema(), indent=1, ensure_ascii=False))
        raise typer.Exit


Recipe = Annotated[
    str,
    string(
        "--config",
        "YAML file, or the name of a recipe that comes with supra.",
        "FILE",
        autocompletion=recipes,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Settings that replace those of the file.", parser=str, metavar="a.b=c"),
]


@app.command(
    cls=UptrainCommand,
    rich_help_panel=MODELS,
    epilog="supra uptrain --config supra student=./rnn data.path=corpus.jsonl out=out/first",
)
def uptrain(
    config: Recipe,
    overrides: Overrides = None,
    accept_changed: Annotated[
        bool,
        flag(
            "--accept-changed",
            "Continue a run even if its config, student, tokenizer, teacher or text has changed.",
        ),
    ] = False,
    schema: Annotated[
        bool,
        flag(
            "--schema",
            "Print the JSON schema of the settings, for editors and other tools.",
            callback=show_schema,
            is_eager=True,
        ),
    ] = False,
) -> None:
    """Train a converted model back to quality, with or without its teacher."""
    from supra.uptrain import load_config, train

    if not train(load_config(config, overrides or []), accept_changed, _flops_per_token):
        raise typer.Exit(STOPPED)


def _flops_per_token(config: Any) -> dict[str, int]:
    from supra.planning.plan import flops_per_token

    return flops_per_token(config)
