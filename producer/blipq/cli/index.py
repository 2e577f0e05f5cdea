"""``blipq index``: images into a search index, and what indexes there are.

LanceDB and numpy are imported only when a command runs: few clients have them.
"""

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from blipq.cli.terminal.group import Group, GroupOfCommands
from blipq.cli.terminal.options import pairs
from blipq.cli.terminal.output import JsonOption, connected, errors, out, reported
from blipq.client.sync_client import Client
from blipq.contract import IndexEntry, Options, Priority
from blipq.errors import BlipqError
from blipq.index import NEEDED
from blipq.program import blipq
from blipq.settings import Settings
from blipq.submission import MOST_NAMED, checked

if TYPE_CHECKING:
    from blipq.index.ingest import Tally
    from blipq.index.store import Indexes, IndexInfo

DEFAULT = "add"


class _DefaultCommand(GroupOfCommands):
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
    priority: Annotated[Priority, typer.Option(help="Served round robin.")] = Priority.LOW,
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
    with _parts(as_json), connected(as_json) as client:
        entry = {"name": name, "metadata": pairs(metadata, "--metadata") or {}}
        options = checked(Options, model=model, priority=priority)
        tally = _fill(client, source, entry, options, window=window, shown=not as_json)
        _show_tally(tally, as_json)
    raise typer.Exit(3 if tally.failed else 0)


@app.command("list")
def list_(as_json: JsonOption = False) -> None:
    """List the indexes.

    Examples:
        blipq index list
    """
    with _parts(as_json):
        infos = _indexes().infos()
        if as_json:
            print(json.dumps({"indexes": [_described(info) for info in infos]}))
            return
        out.print(_table(infos) if infos else "no indexes")


@app.command()
def show(name: NameArgument, as_json: JsonOption = False) -> None:
    """Show an index, for each checkpoint that it has vectors of.

    Examples:
        blipq index show photos
    """
    with _parts(as_json):
        described = [_described(info) for info in _named(_indexes(), name)]
    if as_json:
        print(json.dumps({"indexes": described}))
        return
    for each in described:
        for key, value in each.items():
            out.print(f"{key:12}{value}", markup=False)


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
    with _parts(as_json):
        images = _delete(name, ids)
    if as_json:
        print(json.dumps({"index": name, "deleted": images}))
    else:
        out.print(f"deleted: {images:,} images")


@contextmanager
def _parts(as_json: bool) -> Iterator[None]:
    """Errors become one line and an exit code, that of a missing part among them."""
    with reported(as_json):
        if not all(map(importlib.util.find_spec, NEEDED)):
            raise BlipqError("a part is missing for indexes: pip install 'blipq[search]'")
        yield


def _indexes() -> "Indexes":
    from blipq.index.store import Indexes

    return Indexes(checked(Settings))


def _fill(
    client: Client,
    source: str,
    entry: dict[str, Any],
    options: Options,
    *,
    window: int,
    shown: bool,
) -> "Tally":
    """Indexes what is under a prefix, with a bar."""
    from blipq.index.ingest import Indexer, Prefix, known_index
    from blipq.index.store import Indexes

    indexes, prefix = Indexes(client.settings), Prefix(client, source)
    total = prefix.count()
    name, model = entry["name"], options.model
    known = known_index(client, indexes, name, model)
    described = checked(IndexEntry, **entry).model_dump(exclude_none=True)
    indexer = Indexer(client, known, described, options, window=window)
    with _bar(shown=shown) as bar:
        task = bar.add_task("", total=total)
        for tally in indexer.run(prefix):
            bar.update(task, completed=tally.done, description=_summary(tally))
    if indexer.tally.indexed:
        index = known or known_index(client, indexes, name, model)
        if index is not None:
            index.compact()
    return indexer.tally


def _bar(*, shown: bool) -> Progress:
    return Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}", markup=False),
        TimeRemainingColumn(),
        console=errors,
        disable=not (shown and errors.is_terminal),
    )


def _summary(tally: "Tally") -> str:
    counts = {"indexed": tally.indexed, "skipped": tally.skipped, "failed": tally.failed}
    return ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)


def _show_tally(tally: "Tally", as_json: bool) -> None:
    if as_json:
        print(json.dumps(asdict(tally)))
        return
    for uri, why in tally.failures:
        errors.print(f"{uri}: {why}", style="red", markup=False)
    if tally.failed > len(tally.failures):
        errors.print(f"and {tally.failed - len(tally.failures):,} more", style="red")
    out.print(_summary(tally) or "no images there", markup=False)


def _delete(name: str, ids: list[str] | None) -> int:
    """Deletes an index, or images from it; how many images went."""
    indexes = _indexes()
    infos = _named(indexes, name)
    if ids:
        return indexes.remove(name, ids)
    for info in infos:
        indexes.delete(info)
    return sum(info.images for info in infos)


def _table(infos: "list[IndexInfo]") -> Table:
    table = Table("index", "images", "size", "checkpoint", "changed", box=None, pad_edge=False)
    for info in infos:
        small = info.bytes < 2**20
        size = f"{info.bytes / (2**10 if small else 2**20):,.1f} {'KiB' if small else 'MiB'}"
        changed = f"{info.changed_at:%Y-%m-%d %H:%M} UTC"
        table.add_row(info.name, f"{info.images:,}", size, Text(info.checkpoint), changed)
    return table


def _named(indexes: "Indexes", name: str) -> "list[IndexInfo]":
    from blipq.index.store import UnknownIndex

    if not (infos := indexes.infos(name)):
        known = ", ".join(sorted({info.name for info in indexes.infos()})[:MOST_NAMED]) or "none"
        command = blipq("index list")
        raise UnknownIndex(f"there is no index {name!r}; there are: {known} ({command} shows all)")
    return infos


def _described(info: "IndexInfo") -> dict[str, Any]:
    dates = {"created_at": info.created_at.isoformat(), "changed_at": info.changed_at.isoformat()}
    return asdict(info) | dates
