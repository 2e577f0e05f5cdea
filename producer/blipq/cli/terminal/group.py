"""A group of commands whose docstrings are their help: text, then ``Examples:``."""

import inspect
import re
from collections.abc import Callable
from typing import Any, TypeVar

import typer
from rich.markup import escape
from typer.core import TyperCommand, TyperGroup

CommandT = TypeVar("CommandT", bound=Callable[..., Any])


class _Plain:
    """Help that names no type for flags, and errors in the words of requests."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for param in getattr(self, "params", ()):
            _without_type(param)

    def get_help_option(self, ctx: Any) -> Any:
        return _without_type(super().get_help_option(ctx))  # type: ignore[misc]

    def make_context(self, *args: Any, **options: Any) -> Any:
        try:
            return super().make_context(*args, **options)  # type: ignore[misc]
        except Exception as error:
            _reword(error)
            raise


class Command(_Plain, TyperCommand):
    """One command."""


class GroupOfCommands(_Plain, TyperGroup):
    """Several commands."""


class Group(typer.Typer):
    """As ``typer.Typer``; what stands behind ``Examples:`` in a docstring is shown last."""

    def __init__(self, help: str, **options: Any) -> None:
        super().__init__(help=help, **{"no_args_is_help": True, "cls": GroupOfCommands, **options})

    def command(self, name: str | None = None, **options: Any) -> Callable[[CommandT], CommandT]:
        """Decorator: registers a function as a command, with its docstring as help."""

        def register(function: CommandT) -> CommandT:
            given = {"cls": Command, **_described(function), **options}
            return super(Group, self).command(name, **given)(function)

        return register

    def callback(self, **options: Any) -> Callable[[CommandT], CommandT]:
        """Decorator: registers what the group does itself, with its docstring as help."""

        def register(function: CommandT) -> CommandT:
            given = {**_described(function), **options}
            return super(Group, self).callback(**given)(function)

        return register


def _described(function: Callable[..., Any]) -> dict[str, Any]:
    """Typer's options for a docstring."""
    text, examples = split_help(function)
    # Lines are broken for the terminal's width, not where the docstring has it.
    text = "\n\n".join(" ".join(each.split()) for each in text.split("\n\n"))
    epilog = escape("Examples:\n\n" + "\n".join(examples)) if examples else None
    return {"help": text, "short_help": _first_sentence(text), "epilog": epilog}


def split_help(function: Callable[..., Any]) -> tuple[str, list[str]]:
    """A command's text, and its examples, a line each."""
    text, _, examples = (inspect.getdoc(function) or "").partition("Examples:\n")
    return text.strip(), [line.strip() for line in examples.splitlines() if line.strip()]


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=\.)\s", text, maxsplit=1)[0]


def _reword(error: Any) -> None:
    """Typer repeats pydantic's error about an argument: "Input should be a valid number"."""
    if error.__cause__ is None or not hasattr(error, "message"):
        return
    # Only now: `blipq --help` ends in an exception, too, and shall not wait for this.
    from pydantic import ValidationError

    from blipq.contract.wording import sentence

    if isinstance(error.__cause__, ValidationError):
        error.message = sentence(error.__cause__.errors()[0])


def _without_type(param: Any) -> Any:
    if getattr(param, "is_flag", False) and param.metavar is None:
        param.metavar = ""
    return param
