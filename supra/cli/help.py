"""Help in plain text, grouped, with an example for each command; and strict reading of arguments.

Typer's own help draws with rich, whose import takes longer than all of `supra --help`.
"""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from typer.core import TyperCommand, TyperGroup

from supra.errors import UserError, check_choice, shown

# headings of `supra --help`
MODELS, MEASURE, RUN, DEVELOP = "Make a model", "Measure a model", "Run a model", "Develop"
OPTIONS = "Options"


class Command(TyperCommand):
    """A command whose epilog is its example."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Raises UserError for an option in place of a value, and for arguments too many."""
        if ctx.resilient_parsing:  # a shell asks what could come next
            return super().parse_args(ctx, args)
        args = _spell_model(self, ctx, args)
        _check_values(self, ctx, args)
        strict, ctx.allow_extra_args = not ctx.allow_extra_args, True
        rest = super().parse_args(ctx, args)
        if strict and rest:
            raise UserError(
                f"unexpected argument {shown(rest[0])}: {usage(self, ctx)} "
                f"({ctx.command_path} --help explains it)"
            )
        return rest

    def format_usage(self, ctx: Any, formatter: Any) -> None:
        formatter.write_text(f"Usage: {usage(self, ctx)}")

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Required options": []}
        for param in self.get_params(ctx):
            if (record := param.get_help_record(ctx)) is None:
                continue
            if param.param_type_name == "argument":
                record, title = (param.metavar, param.help), "Arguments"
            elif param.required:
                record, title = (record[0], param.help), "Required options"
            else:
                title = param.rich_help_panel or OPTIONS
            sections.setdefault(title, []).append(record)
        _write_sections(formatter, sections)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        if self.epilog:
            write_lines(formatter, "Example", self.epilog.splitlines())


class Group(TyperGroup):
    """Commands under the headings of their panels."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Raises UserError without a command."""
        if not args and not ctx.resilient_parsing:
            raise UserError(
                f"{ctx.command_path} needs a command: {', '.join(self.commands)} "
                f"({ctx.command_path} --help explains them)"
            )
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[Any, Any, list[str]]:
        """Raises UserError for an unknown command."""
        if not ctx.resilient_parsing:
            check_choice(f"{ctx.command_path} command", args[0], self.commands)
        return super().resolve_command(ctx, args)

    def format_usage(self, ctx: Any, formatter: Any) -> None:
        formatter.write_text(f"Usage: {ctx.command_path} COMMAND [OPTIONS]")

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for name, command in self.commands.items():
            title = command.rich_help_panel or "Commands"
            sections.setdefault(title, []).append((name, command.get_short_help_str(limit=100)))
        records = (param.get_help_record(ctx) for param in self.get_params(ctx))
        sections[OPTIONS] = [record for record in records if record is not None]
        _write_sections(formatter, sections)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        if self.epilog:
            formatter.write_paragraph()
            formatter.write_text(self.epilog)


def usage(command: Any, ctx: Any) -> str:
    """`supra inspect MODEL [OPTIONS]`: a command with what it requires."""
    words = [ctx.command_path]
    for param in command.params:
        if param.param_type_name == "argument":
            words.append(param.metavar if param.required else f"[{param.metavar} …]")
        elif param.required:
            words += [param.opts[0], param.metavar]
    return " ".join([*words, "[OPTIONS]"])


def write_lines(formatter: Any, title: str, lines: Iterable[str]) -> None:
    """A section whose lines stay as they are."""
    with formatter.section(title):
        for line in lines:
            formatter.write(f"{'':>{formatter.current_indent}}{line}".rstrip() + "\n")


def _write_sections(formatter: Any, sections: dict[str, list[tuple[str, str]]]) -> None:
    for title, records in sections.items():
        if records:
            with formatter.section(title):
                formatter.write_dl(records)


def _spell_model(command: Any, ctx: Any, args: list[str]) -> list[str]:
    """The arguments with the model as the command declares it. A user may always give it first or
    as --model."""
    model = next((x for x in command.get_params(ctx) if x.name == "model"), None)
    if model is None:
        return args
    given = next((n for n, x in enumerate(args) if x.partition("=")[0] == "--model"), None)
    if model.param_type_name == "argument" and given is not None:
        _, equals, value = args[given].partition("=")
        before, after = args[:given], args[given + 1 :]
        return [value, *before, *after] if equals else [*after[:1], *before, *after[1:]]
    if model.param_type_name == "option" and given is None and args and args[0][:1] != "-":
        return ["--model", *args]
    return args


def _check_values(command: Any, ctx: Any, args: list[str]) -> None:
    """Raise UserError for an option without a value, and for a flag with one."""
    params = command.get_params(ctx)
    options = {name: param for param in params for name in param.opts if name.startswith("-")}
    for word, following in pairwise([*args, None]):
        if word == "--":  # what follows are arguments
            return
        name, equals, _ = word.partition("=")
        if name not in options:
            continue
        if options[name].is_flag:
            if equals:
                raise UserError(f"{name} takes no value: write {name} alone")
        elif not equals and (following is None or following in options):
            found = "nothing" if following is None else following
            raise UserError(
                f"{name} needs a value, and {found} follows it: {name} {options[name].metavar}"
            )
