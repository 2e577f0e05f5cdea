"""``blipq index``: images into a search index, and what indexes there are.

The worker's package knows; it runs in this process' place, so that nothing of it is imported here.
"""

import importlib.util
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from blipq.cli.terminal.group import Group
from blipq.cli.terminal.output import JsonOption, reported
from blipq.errors import BlipqError

NEEDED = ("lancedb", "numpy")
DEFAULT = "add"


class _DefaultCommand(TyperGroup):
    """``blipq index s3://...`` is ``blipq index add s3://...``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in {*self.commands, "-h", "--help"}:
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)


app = Group("Images to search, by text or by image.", cls=_DefaultCommand)

NameArgument = Annotated[str, typer.Argument(help="The index.")]


@app.command()
def add(
    source: Annotated[str, typer.Argument(help="s3://bucket/prefix that the images are under.")],
    name: Annotated[str, typer.Option(help="The index; it is made if there is none.")],
    model: Annotated[str, typer.Option(help="Served model.")] = "default",
    metadata: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Of every image, to filter by; may be repeated."),
    ] = None,
    priority: Annotated[str, typer.Option(help="high, normal or low.")] = "low",
    window: Annotated[int, typer.Option(min=1, help="Most jobs in flight.")] = 512,
    as_json: JsonOption = False,
) -> None:
    """Index the images under a prefix; the word add may be left out.

    What is indexed with the same ETag is skipped: stop it at any time, and run it again. Exits 3
    if an image could not be indexed.

    Examples:
        blipq index add s3://photos/2026/ --name photos
        blipq index add s3://photos/2026/ --name photos --metadata year=2026
    """
    pairs = [part for pair in metadata or () for part in ("--metadata", pair)]
    options = ["--name", name, "--model", model, "--priority", priority, "--window", str(window)]
    _become("add", source, *options, *pairs, as_json=as_json)


@app.command("list")
def list_(as_json: JsonOption = False) -> None:
    """List the indexes.

    Examples:
        blipq index list
    """
    _become("list", as_json=as_json)


@app.command()
def show(name: NameArgument, as_json: JsonOption = False) -> None:
    """Show an index, for each checkpoint that it has vectors of.

    Examples:
        blipq index show photos
    """
    _become("show", name, as_json=as_json)


@app.command()
def delete(
    name: NameArgument,
    ids: Annotated[
        list[str] | None,
        typer.Option("--id", help="Only this image, by default its URI; may be repeated."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Delete an index, or images from it.

    Examples:
        blipq index delete photos --id s3://photos/2026/1.jpg
        blipq index delete photos
    """
    _become("delete", name, *[part for id in ids or () for part in ("--id", id)], as_json=as_json)


def _become(*arguments: str, as_json: bool) -> None:
    """Runs the worker's command in this process' place. Does not return."""
    flags = ["--json"] if as_json else []
    with reported(as_json):
        if not all(map(importlib.util.find_spec, NEEDED)):
            raise BlipqError("a part is missing for indexes: pip install 'blipq[search]'")
        command = [sys.executable, "-m", "blipq_worker.index.ingest", *arguments, *flags]
        os.execv(command[0], command)
