"""Commands of the distribution ``blipq-worker``, which joins ``blipq`` through entry points.

``blipq --help`` shows them from the table below; what is installed is looked up, and its module
imported, only when one is called.
"""

from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from blipq.cli.terminal.group import Group
from blipq.cli.terminal.output import reported
from blipq.errors import BlipqError
from blipq.local.worker import NO_WORKER

#: Each name is a function, or a typer.Typer with commands of its own.
ENTRY_POINTS = "blipq.commands"

#: Names and the first line of their help, as the worker's modules have it.
COMMANDS = {
    "demo": "Show it all in a minute, on pictures whose content is known.",
    "bench": "Compare the whole service with the bare engine.",
    "worker": "Run a worker for the services that the settings name.",
    "models": "Models that can be served.",
}


def add_command(app: typer.Typer, name: str, *, panel: str) -> None:
    """Registers one of the worker's commands by its name and help alone."""
    options: dict[str, Any] = {"help": COMMANDS[name], "rich_help_panel": panel}
    typer.Typer.command(app, name, cls=_Command, **options)(_stand_in)


def add_group(app: typer.Typer, name: str, *, panel: str) -> None:
    """Registers one of the worker's groups of commands by its name and help alone."""
    app.add_typer(Group(COMMANDS[name]), name=name, cls=_Group, rich_help_panel=panel)


def _stand_in() -> None:
    """Never called: ``make_context`` below hands over to the worker's command."""


def loaded(command: Any) -> Any:
    """The worker's command where this is what stands in for it, else the command itself.

    Raises BlipqError where no worker is installed.
    """
    if not isinstance(command, _Command | _Group):
        return command
    # Only now: `blipq --help` shall not wait for its import.
    from importlib.metadata import entry_points

    name = str(command.name)
    found = [entry.load() for entry in entry_points(group=ENTRY_POINTS, name=name)]
    if not found:
        raise BlipqError(NO_WORKER)
    app = Group(COMMANDS[name])
    if isinstance(found[0], typer.Typer):
        app.add_typer(found[0], name=name)
    else:
        app.command(name)(found[0])
    group: Any = typer.main.get_group(app)
    return group.commands[name]


def _context_of(stand_in: Any, name: Any, args: Sequence[str], parent: Any, extra: Any) -> Any:
    with reported("--json" in args):
        command = loaded(stand_in)
    return command.make_context(name, list(args), parent, **extra)


class _Command(TyperCommand):
    """Shown in the help of ``blipq``; becomes the worker's command when it is called."""

    def make_context(self, info_name: Any, args: Any, parent: Any = None, **extra: Any) -> Any:
        return _context_of(self, info_name, args, parent, extra)


class _Group(TyperGroup):
    """The same for a group of commands."""

    def make_context(self, info_name: Any, args: Any, parent: Any = None, **extra: Any) -> Any:
        return _context_of(self, info_name, args, parent, extra)
