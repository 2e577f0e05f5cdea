"""``blipq bulk report``: a contact sheet of a run."""

import importlib.util
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer

from blipq.bulk.start import journal_path
from blipq.cli import bulk
from blipq.cli.terminal.output import JsonOption, connected, out
from blipq.client.sync_client import Client
from blipq.errors import BlipqError, InvalidRequest
from blipq.files import is_same
from blipq_datasets.cli.figures import duration, interval
from blipq_datasets.dataset import Dataset
from blipq_datasets.journal import DatasetJournal
from blipq_datasets.recipe import Recipe
from blipq_datasets.report.rows import rows_of
from blipq_datasets.start import dataset_of

NEEDED = ("PIL", "jinja2")


def report(
    journal: bulk.JournalArgument,
    output: Annotated[Path, typer.Option(metavar="FILE", help="The page.", dir_okay=False)] = Path(
        "report.html"
    ),
    rows: Annotated[int, typer.Option(min=1, max=2000, help="Rows that it shows.")] = 200,
    as_json: JsonOption = False,
) -> None:
    """Write a page of a run: rows with pictures, answers and errors, and what it took.

    One HTML file that loads nothing and runs no script. It needs blipq[search].

    Examples:
        blipq bulk report cars.csv
        blipq bulk report cars.csv.bulk --rows 500 --output cars.html
    """
    with connected(as_json) as client:
        if not all(map(importlib.util.find_spec, NEEDED)):
            raise BlipqError("a part is missing for reports: pip install 'blipq[search]'")
        from blipq_datasets.report.sheet import write_sheet

        path = journal_path(journal)
        with closing(DatasetJournal.open(path)) as kept:
            dataset = _dataset_of(kept, client)
            if any(is_same(output, each) for each in (path, dataset.name)):
                raise InvalidRequest(f"--output: {output} is the run's own: give another file")
            chosen = rows_of(dataset, kept, rows)
            summary = bulk.summary_of(kept)
            facts = {**summary, "source": dataset.name, "figures": [*_figures(kept, summary)]}
            shown = write_sheet(chosen, facts, client.storage, output)
    if as_json:
        print(json.dumps({"output": str(output), "rows": shown}))
    else:
        out.print(f"{output}: {shown:,} rows", markup=False)


def _dataset_of(journal: DatasetJournal, client: Client) -> Dataset:
    """The dataset of a journal. Raises InvalidRequest if it has changed."""
    kept = journal.fact("recipe")
    if kept is None:
        raise InvalidRequest(f"{journal.path} is of a manifest, or of an earlier version")
    recipe, source = Recipe.model_validate(kept), journal.fact("manifest")
    dataset = dataset_of(source, recipe, client, journal.path, journal.fact("id"))
    if dataset.version != journal.fact("version"):
        raise InvalidRequest(f"{source} has changed since the run: its rows are others")
    return dataset


def _figures(journal: DatasetJournal, summary: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for status, count in summary["counts"].items():
        yield status, f"{count:,}"
    took = journal.took()
    yield "time", duration(took["s"])
    yield "GPU time", f"{duration(took['gpu_s'])} for {took['jobs']:,} jobs"
    yield "cache hits", f"{took['cache_hits']:,}"
    if (estimate := journal.fact("estimate")) is not None:
        yield "estimated time", interval(estimate["run_s"])
        yield "estimated GPU time", interval(estimate["gpu_s"])
