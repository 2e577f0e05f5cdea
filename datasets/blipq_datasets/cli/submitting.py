"""``blipq bulk submit`` for datasets; plain manifests it leaves to the command of the client."""

import json
import time
from contextlib import suppress
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from blipq.bulk.driver import Driver
from blipq.bulk.journal import driving
from blipq.bulk.manners import HOST_RATE, Manners
from blipq.cli import bulk
from blipq.cli.terminal.output import JsonOption, connected, errors, out, reported
from blipq.client.recording import AWAY
from blipq.client.sync_client import Client
from blipq.contract import Priority
from blipq.errors import InvalidRequest, QueueUnavailable
from blipq.s3.refusals import S3Refused
from blipq_datasets import flags
from blipq_datasets.cli.figures import took_line
from blipq_datasets.dataset import Dataset
from blipq_datasets.journal import Clock
from blipq_datasets.start import Run, begun, dataset_of
from blipq_datasets.uploads import Uploads

#: Rows that a preview shows.
SHOWN = 3


def submit(
    source: flags.Source = None,
    prefix: flags.PrefixOption = None,
    template: flags.TemplateOption = None,
    recipe: flags.RecipeOption = None,
    kind: flags.KindOption = None,
    question: flags.QuestionOption = None,
    text: flags.TextOption = None,
    prompt: flags.PromptOption = None,
    image_column: flags.ImageColumnOption = None,
    id_column: flags.IdColumnOption = None,
    prompt_column: flags.PromptColumnOption = None,
    to: flags.ToOption = None,
    output: flags.OutputOption = None,
    escape_formulas: flags.EscapeOption = False,
    dry_run: flags.DryRunOption = False,
    update: flags.UpdateOption = False,
    journal: flags.JournalOption = None,
    window: bulk.WindowOption = None,
    rate: bulk.RateOption = None,
    host_rate: bulk.HostRateOption = HOST_RATE,
    until: bulk.UntilOption = None,
    model: flags.ModelOption = None,
    priority: flags.PriorityOption = None,
    expires_in: flags.ExpiresOption = None,
    as_json: JsonOption = False,
) -> None:
    """Submit a dataset or a manifest and collect; the same command again goes on after a kill.

    A .jsonl file, or one of no known ending, without options of datasets is a manifest: a request
    per line (docs/bulk.md). Anything else is a dataset (docs/datasets.md). Exits 0 if all rows
    succeeded, 3 if not, 5 where it stopped at --until.

    Examples:
        blipq bulk submit manifest.jsonl
        blipq bulk submit s3://photos/shards/ --question "what is it?"
        blipq bulk submit cars.csv --image-column url --prompt "a {color} car"
        blipq bulk submit --recipe cars.toml --dry-run
    """
    given = flags.Flags(**locals())  # nothing else is local yet
    with reported(as_json):
        is_of_a_manifest = given.is_of_a_manifest
    if is_of_a_manifest:
        bulk.submit(
            manifest=source,
            prefix=prefix,
            template=template,
            journal=journal,
            window=window,
            rate=rate,
            host_rate=host_rate,
            until=until,
            model=model or "default",
            priority=priority or Priority.LOW,
            expires_in=expires_in,
            as_json=as_json,
        )
    else:
        _submit_dataset(given)


def _submit_dataset(given: flags.Flags) -> None:
    with connected(given.as_json) as client:
        if given.prefix is not None or given.template is not None:
            raise InvalidRequest("--prefix and --template are for manifests: give a source")
        recipe, source, path = given.named
        manners = given.manners
        if given.dry_run:
            with TemporaryDirectory(prefix="blipq-") as folder:
                shown = Path(folder, "preview")
                _show(dataset_of(source, recipe, client, shown, "0"), given.as_json)
            return
        with suppress(QueueUnavailable):  # the driver waits for Redis, and meets it then
            client.ledger.check_models([recipe.options.get("model", "default")])
        with driving(path), begun(source, recipe, client, path, update=given.update) as run:
            window = given.window or client.settings.window
            _work(client, run, window, manners, given.as_json)


def _show(dataset: Dataset, as_json: bool) -> None:
    """The requests of the first rows."""
    for entry in islice(dataset.preview(), SHOWN):
        job = json.loads(entry.work) if entry.work else {"error": entry.error}
        shown = {"key": entry.custom_id, **job}
        if as_json:
            print(json.dumps(shown))
        else:
            out.print(json.dumps(shown, ensure_ascii=False, indent=2), markup=False)


def _work(client: Client, run: Run, window: int, manners: Manners, as_json: bool) -> None:
    clock = Clock(run.journal)

    def report(driver: Driver) -> None:
        clock.note()
        with suppress(QueueUnavailable):
            _tidy(run)
            if run.output is not None:
                run.output.write_due()

    def entries(number: int, position: str) -> Any:
        return run.dataset.entries(number, position, run.journal.is_known)

    def share(driver: Driver) -> float | None:
        with suppress(QueueUnavailable):
            return run.dataset.share(driver.position)
        return None

    bulk.drive(client, run.journal, entries, share, window, manners, as_json, report)
    clock.note(at_once=True)
    _finish(run, as_json)
    took = {"took": run.journal.took(), "estimate": run.journal.fact("estimate")}
    if not as_json:
        errors.print(took_line(**took), style="dim", markup=False)
    bulk.end(run.journal, as_json, took)


def _tidy(run: Run) -> None:
    """Deletes pictures that were uploaded for rows that have ended."""
    uploads = run.dataset.uploads
    uploads.delete(run.journal.ended_among(uploads.held))


def _finish(run: Run, as_json: bool) -> None:
    """Writes the last shards and deletes the last uploads, however long S3 is away."""
    for tries in range(1_000_000):
        try:
            if run.output is not None:
                run.output.finish()
            if "open" not in run.journal.counts():  # those that are need their pictures
                with suppress(S3Refused):
                    run.dataset.uploads.sweep()
            _tell_of_left(run.dataset.uploads, as_json)
            return
        except QueueUnavailable as error:
            if not as_json:
                errors.print(str(error), style="yellow", markup=False)
            time.sleep(AWAY.pause_s(tries))


def _tell_of_left(uploads: Uploads, as_json: bool) -> None:
    """Pictures that S3 refused to delete stay for the inbox's lifecycle rule."""
    if uploads.left and not as_json:
        text = f"S3 refused to delete {uploads.left:,} uploaded pictures: {uploads.prefix}"
        errors.print(text, style="yellow", markup=False)
