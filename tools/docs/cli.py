"""Writes docs/cli.md from the command's own help: ``python -m tools.docs.cli``."""

import inspect
import sys
from collections.abc import Iterator
from enum import Enum
from typing import Any

import typer
from tools.docs import DOCS, write_or_check

import blipq.cli
from blipq.cli import app
from blipq.cli.commands import loaded
from blipq.cli.terminal.group import split_help

PAGE = DOCS / "cli.md"

HEAD = """\
# The command

<!-- Written by `python -m tools.docs.cli`. Change the commands' help, not this page. -->

Results go to stdout, messages to stderr. `--json` makes stdout one JSON object, and stderr silent;
what reports jobs one after the other (`wait`, `watch`, `caption` of several images) prints one a
line. `blipq COMMAND --help` prints the same text. The services that commands connect to are set by
the variables of [configuration.md](configuration.md).
"""


def page() -> str:
    """The whole page."""
    group: Any = typer.main.get_command(app)
    exit_codes = (inspect.getdoc(blipq.cli) or "").partition("Exit codes: ")[2]
    parts = [HEAD, f"Exit codes: {exit_codes}\n"]
    parts += [
        part for path, command in commands(group, "blipq") for part in _section(path, command)
    ]
    return "\n".join(parts)


def commands(group: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every command with its full name."""
    for name in sorted(group.commands):
        command = loaded(group.commands[name])
        if getattr(command, "invoke_without_command", False):
            yield f"{path} {name}", command
        if hasattr(command, "commands"):
            yield from commands(command, f"{path} {name}")
        elif not command.hidden:
            yield f"{path} {name}", command


def _section(path: str, command: Any) -> Iterator[str]:
    text, examples = split_help(command.callback)
    yield f"## {path}\n"
    yield text + "\n"
    yield "\n".join(f"    {line}" for line in examples) + "\n"
    rows = [_row(param) for param in command.params if param.name != "help"]
    if rows:
        yield "| argument | default | meaning |\n|---|---|---|"
        yield "\n".join(rows) + "\n"


def _row(param: Any) -> str:
    names = ", ".join(f"`{name}`" for name in (*param.opts, *param.secondary_opts))
    if param.param_type_name == "argument":
        names = f"`{param.metavar or param.name.upper()}`"
    default = param.default
    shown = "" if default in (None, False, ()) or callable(default) else f"`{_text(default)}`"
    return f"| {names} | {'required' if param.required else shown} | {_meaning(param)} |"


def _text(default: Any) -> str:
    if isinstance(default, bool):
        return "yes"
    return f"{default:g}" if isinstance(default, float) else str(default)


def _meaning(param: Any) -> str:
    text = (param.help or "").replace("|", "\\|")
    kind = param.type_descriptor.annotation
    choices = list(kind) if isinstance(kind, type) and issubclass(kind, Enum) else []
    return (
        f"{text} One of {', '.join(f'`{_text(each)}`' for each in choices)}." if choices else text
    )


if __name__ == "__main__":
    sys.exit(write_or_check({PAGE: page()}, "tools.docs.cli"))
