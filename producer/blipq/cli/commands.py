"""Every command by its name and the first sentence of its help: what ``blipq --help`` shows.

A command's module is imported only when it is called. Those of the distributions ``blipq-api`` and
``blipq-worker`` join through entry points, which are looked up only then, too.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand

from blipq.cli.terminal.group import Group, GroupOfCommands

#: Each name is a function, or a typer.Typer with commands of its own.
ENTRY_POINTS = "blipq.commands"

#: The place of commands that another distribution brings.
_DOOR, _WORKER = "blipq-api", "blipq-worker"

#: By panel: the name, where it is, and its help.
_PANELS: dict[str, list[tuple[str, str, str]]] = {
    "Ask about an image": [
        ("caption", "jobs:caption", "Describe an image, or several."),
        ("vqa", "jobs:vqa", "Ask questions about an image."),
        ("match", "jobs:match", "Score texts against an image."),
        ("explain", "explain:explain", "Show where in an image a text was found."),
        ("embed", "jobs:embed", "Get the features of an image, of a text, or of both together."),
        ("describe", "jobs:describe", "Ask for several things about an image at once."),
        ("search", "search:search", "Find images in an index by a text, or by an image."),
    ],
    "Follow jobs": [
        ("status", "jobs:status", "Show where a job is, and when no live worker serves its model."),
        ("result", "jobs:result", "Wait for a job and print its result."),
        ("wait", "overview:wait", "Wait for jobs to end."),
        ("cancel", "changes:cancel", "Cancel jobs: those of ids, or all that match."),
        ("retry", "changes:retry", "Queue jobs again that ended without a result."),
        ("expedite", "changes:expedite", "Move jobs that wait into another priority's queue."),
        ("forget", "changes:forget", "Erase jobs with all that they left."),
        ("list", "overview:list_", "List jobs, the newest first."),
    ],
    "Many images": [
        ("bulk", "bulk:app", "Many requests from a manifest, some at a time."),
        ("watch", "watch:watch", "Make jobs of uploads that match a file of rules, until SIGTERM."),
        ("index", "index:app", "Images to search, by text or by image."),
    ],
    "Run it": [
        ("demo", _WORKER, "Show it all in a minute, on pictures whose content is known."),
        ("up", "services:up", "Start a local stack: Redis, S3, a worker and the HTTP door."),
        ("down", "services:down", "Stop the local stack that `blipq up` started."),
        ("env", "services:env", "Print how other programs reach Redis and S3."),
        ("worker", _WORKER, "Run a worker for the services that the settings name."),
        ("models", _WORKER, "Models that can be served."),
        ("bench", _WORKER, "Compare the whole service with the bare engine."),
    ],
    "Operate it": [
        ("api", _DOOR, "Answer HTTP until SIGTERM: jobs, uploads, queues, webhooks."),
        ("doctor", "ops.doctor:doctor", "Check everything a job needs."),
        ("queue", "overview:app", "The queues that jobs wait in."),
        ("dead-letters", "ops.dead_letters:app", "Jobs that are out of attempts."),
        ("log", "overview:log", "List who did what, the newest first."),
        ("webhooks", "ops.webhooks:app", "Outcomes by signed webhook."),
        ("metrics", "ops.metrics:metrics", "Serve Prometheus metrics of the queues until SIGTERM."),
    ],
}
_GROUPS = frozenset({"api", "bulk", "dead-letters", "index", "models", "queue", "webhooks"})
#: Groups that other distributions may add commands to, or replace them in: by which entry points.
_ADDED = {"bulk": "blipq.bulk"}
_PLACES = {name: place for panel in _PANELS.values() for name, place, _ in panel}

#: Names and help.
COMMANDS = {name: help for panel in _PANELS.values() for name, _, help in panel}


def add_all(app: typer.Typer) -> None:
    """Registers what stands in for each command."""
    for panel, found in _PANELS.items():
        for name, _, help in found:
            if name in _GROUPS:
                app.add_typer(Group(help), name=name, cls=_Group, rich_help_panel=panel)
            else:
                options: dict[str, Any] = {"help": help, "rich_help_panel": panel}
                typer.Typer.command(app, name, cls=_Command, **options)(_stand_in)


def _stand_in() -> None:
    """Never called: ``make_context`` below hands over to the command itself."""


def loaded(command: Any) -> Any:
    """The command itself where this is what stands in for it.

    Raises BlipqError for a command of a distribution that is not installed.
    """
    if not isinstance(command, _Command | _Group):
        return command
    name = str(command.name)
    app = Group(COMMANDS[name])
    found = next(_found(name))
    if isinstance(found, typer.Typer):
        app.add_typer(found, name=name)
    else:
        app.command(name)(found)
    group: Any = typer.main.get_group(app)
    return group.commands[name]


def _found(name: str) -> Iterator[Any]:
    from importlib.metadata import entry_points

    place = _PLACES[name]
    if place not in (_DOOR, _WORKER):
        module, _, attribute = place.partition(":")
        found = getattr(import_module(f"blipq.cli.{module}"), attribute)
        for entry in entry_points(group=_ADDED[name]) if name in _ADDED else ():
            with suppress(ModuleNotFoundError):  # in a clone whose extra `datasets` is missing
                found.command(entry.name)(entry.load())
        yield found
        return

    yield from (entry.load() for entry in entry_points(group=ENTRY_POINTS, name=name))
    from blipq.errors import BlipqError
    from blipq.local.door import NO_DOOR
    from blipq.local.worker import NO_WORKER

    raise BlipqError(NO_DOOR if place == _DOOR else NO_WORKER)


def _context_of(stand_in: Any, name: Any, args: Sequence[str], parent: Any, extra: Any) -> Any:
    from blipq.cli.terminal.output import reported

    with reported("--json" in args):
        command = loaded(stand_in)
    return command.make_context(name, list(args), parent, **extra)


class _Command(TyperCommand):
    """Shown in the help of ``blipq``; becomes the command itself when it is called."""

    def make_context(self, info_name: Any, args: Any, parent: Any = None, **extra: Any) -> Any:
        return _context_of(self, info_name, args, parent, extra)


class _Group(GroupOfCommands):
    """The same for a group of commands."""

    def make_context(self, info_name: Any, args: Any, parent: Any = None, **extra: Any) -> Any:
        return _context_of(self, info_name, args, parent, extra)
