"""``blipq bulk submit`` for datasets; plain manifests it leaves to the command of the client."""

import json
import time
from contextlib import suppress
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from blipq.bulk.driver import Driver
from blipq.bulk.journal import driving
from blipq.bulk.start import journal_path
from blipq.cli import bulk
from blipq.cli.terminal.output import JsonOption, connected, errors, out
from blipq.client.recording import AWAY
from blipq.client.sync_client import Client
from blipq.contract import Kind, Priority
from blipq.errors import InvalidRequest, QueueUnavailable
from blipq.s3.refusals import S3Refused
from blipq_datasets.dataset import Dataset
from blipq_datasets.recipe import recipe_from
from blipq_datasets.start import Run, begun, dataset_of

#: Rows that a preview shows.
SHOWN = 3


def submit(
    source: Annotated[
        str | None,
        typer.Argument(
            help="A file, folder, s3:// object or prefix: pictures, tars, Parquet, CSV, JSON lines."
        ),
    ] = None,
    prefix: Annotated[
        str | None, typer.Option(metavar="S3-URI", help="Instead: a request per object under it.")
    ] = None,
    template: Annotated[
        Path | None, typer.Option(help="With --prefix: the request, as JSON without its image.")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="A file of TOML with these options and a request.")
    ] = None,
    kind: Annotated[
        Kind | None,
        typer.Option(metavar="KIND", help="caption, vqa, match, embed or describe."),
    ] = None,
    question: Annotated[
        list[str] | None, typer.Option(help="A question to each picture; may be repeated.")
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="A text to score against each; may be repeated.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="How each caption begins.")] = None,
    image_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="The pictures: URIs, paths or bytes.")
    ] = None,
    id_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="The rows' keys, each once.")
    ] = None,
    prompt_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="A prompt, question or text for each row.")
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(metavar="KIND", help="parquet (default), jsonl, csv or webdataset."),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Where answered shards go: a folder or s3:// prefix."),
    ] = None,
    escape_formulas: Annotated[
        bool, typer.Option(help="In CSV: ' before what a spreadsheet would run.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option(help="Show the requests of the first three rows, and submit nothing.")
    ] = False,
    update: Annotated[
        bool, typer.Option(help="Begin a run anew that is over: submit only what has changed.")
    ] = False,
    journal: Annotated[
        str | None, typer.Option(help="What became of each row; by default SOURCE.bulk here.")
    ] = None,
    window: Annotated[int | None, typer.Option(min=1, help=bulk.WINDOW_HELP)] = None,
    model: Annotated[
        str | None, typer.Option(help="Served model of rows or lines that name none.")
    ] = None,
    priority: Annotated[
        Priority | None, typer.Option(metavar="PRIORITY", help="high, normal or (default) low.")
    ] = None,
    expires_in: Annotated[str | None, typer.Option(help="Their deadline, such as 2d.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Submit a dataset or a manifest and collect; the same command again goes on after a kill.

    A .jsonl file without options of datasets is a manifest: a request per line (docs/bulk.md).
    Anything else is a dataset (docs/datasets.md). Exits 0 if all rows succeeded, 3 if not.

    Examples:
        blipq bulk submit manifest.jsonl
        blipq bulk submit s3://photos/shards/ --question "what is it?"
        blipq bulk submit cars.csv --image-column url --prompt "a {color} car"
        blipq bulk submit --recipe cars.toml --dry-run
    """
    request = {
        "kind": _kind(kind, question, text),
        "prompt": prompt,
        "questions": question,
        "texts": text,
    }
    options = {"model": model, "priority": priority, "expires_in": expires_in}
    flags: dict[str, Any] = {
        "source": source,
        "image_column": image_column,
        "id_column": id_column,
        "prompt_column": prompt_column,
        "to": to,
        "output": output,
        "escape_formulas": escape_formulas or None,
        "request": _given(request),
    }
    chosen_here = [name for name, value in flags.items() if value is not None and name != "source"]
    if _is_manifest(source, prefix) and not (chosen_here or recipe or dry_run or update):
        bulk.submit(
            manifest=source,
            prefix=prefix,
            template=template,
            journal=journal,
            window=window,
            model=model or "default",
            priority=priority or Priority.LOW,
            expires_in=expires_in,
            as_json=as_json,
        )
        return
    with connected(as_json) as client:
        if prefix is not None or template is not None:
            raise InvalidRequest("--prefix and --template are for manifests: give a source")
        chosen = recipe_from(recipe, {**flags, "options": _given(options)})
        chosen = chosen.with_low_priority()
        if chosen.source is None:
            raise InvalidRequest("give a source, or a recipe that names one")
        path = journal_path(journal or chosen.source)
        if dry_run:
            with TemporaryDirectory(prefix="blipq-") as folder:
                shown = Path(folder, "preview")
                _show(dataset_of(chosen.source, chosen, client, shown, "0"), as_json)
            return
        with suppress(QueueUnavailable):  # the driver waits for Redis, and meets it then
            client.ledger.check_models([chosen.options.get("model", "default")])
        with driving(path), begun(chosen.source, chosen, client, path, update=update) as run:
            _work(client, run, window or client.settings.window, as_json)


def _kind(kind: Kind | None, questions: list[str] | None, texts: list[str] | None) -> str | None:
    """The kind that the flags mean."""
    if kind is not None:
        return str(kind)
    return "vqa" if questions else "match" if texts else None


def _given(fields: dict[str, Any]) -> dict[str, Any] | None:
    given = {name: value for name, value in fields.items() if value}
    return given or None


def _is_manifest(source: str | None, prefix: str | None) -> bool:
    if source is None:
        return prefix is not None
    return source.lower().endswith((".jsonl", ".ndjson"))


def _show(dataset: Dataset, as_json: bool) -> None:
    """The requests of the first rows."""
    for entry in islice(dataset.preview(), SHOWN):
        job = json.loads(entry.work) if entry.work else {"error": entry.error}
        shown = {"key": entry.custom_id, **job}
        if as_json:
            print(json.dumps(shown))
        else:
            out.print(json.dumps(shown, ensure_ascii=False, indent=2), markup=False)


def _work(client: Client, run: Run, window: int, as_json: bool) -> None:
    def tell(driver: Driver) -> None:
        with suppress(QueueUnavailable):
            _tidy(run)
            if run.output is not None:
                run.output.write_due()

    def entries(number: int, position: str) -> Any:
        return run.dataset.entries(number, position, run.journal.is_known)

    bulk.drive(client, run.journal, entries, None, window, as_json, tell)
    _finish(run, as_json)
    bulk.end(run.journal, as_json)


def _tidy(run: Run) -> None:
    """Deletes pictures that were uploaded for rows that have ended."""
    with suppress(S3Refused):  # who may not delete keeps them for the inbox's lifecycle rule
        uploads = run.dataset.uploads
        uploads.delete(run.journal.ended_among(uploads.held))


def _finish(run: Run, as_json: bool) -> None:
    """Writes the last shards and deletes the last uploads, however long S3 is away."""
    for tries in range(1_000_000):
        try:
            if run.output is not None:
                run.output.finish()
            with suppress(S3Refused):
                run.dataset.uploads.sweep()
            return
        except QueueUnavailable as error:
            if not as_json:
                errors.print(str(error), style="yellow", markup=False)
            time.sleep(AWAY.pause_s(tries))
