"""A group of commands whose docstrings are their help: text, then ``Examples:``."""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import typer
from rich.markup import escape

CommandT = TypeVar("CommandT", bound=Callable[..., Any])


class Group(typer.Typer):
    """As ``typer.Typer``; what stands behind ``Examples:`` in a docstring is shown last."""

    def __init__(self, help: str, **options: Any) -> None:
        super().__init__(help=help, no_args_is_help=True, **options)

    def command(self, name: str | None = None, **options: Any) -> Callable[[CommandT], CommandT]:
        """Decorator: registers a function as a command, with its docstring as help."""

        def register(function: CommandT) -> CommandT:
            text, examples = split_help(function)
            # Lines are broken for the terminal's width, not where the docstring has it.
            text = "\n\n".join(" ".join(each.split()) for each in text.split("\n\n"))
            options["epilog"] = escape("Examples:\n\n" + "\n".join(examples)) if examples else None
            return super(Group, self).command(name, help=text, **options)(function)

        return register


def split_help(function: Callable[..., Any]) -> tuple[str, list[str]]:
    """A command's text, and its examples, a line each."""
    text, _, examples = (inspect.getdoc(function) or "").partition("Examples:\n")
    return text.strip(), [line.strip() for line in examples.splitlines() if line.strip()]
