"""A dataset's journal, shards and output, as the command line and a recipe name them."""

import secrets
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blipq.bulk.start import check_tenant
from blipq.client.sync_client import Client
from blipq.errors import InvalidRequest
from blipq.program import blipq
from blipq.s3.refusals import S3Refused
from blipq_datasets.dataset import Dataset
from blipq_datasets.journal import DatasetJournal
from blipq_datasets.output.shards import Output
from blipq_datasets.output.targets import target_of
from blipq_datasets.recipe import Recipe
from blipq_datasets.sources.finding import ending_of, shards_of
from blipq_datasets.uploads import Uploads


@dataclass(frozen=True, slots=True)
class Run:
    """A dataset that is being worked on."""

    journal: DatasetJournal
    dataset: Dataset
    output: Output | None


def dataset_of(source: str, recipe: Recipe, client: Client, path: Path, id: str) -> Dataset:
    """The dataset of a bulk with this id and this journal. Raises InvalidRequest."""
    listing = listing_of(path, id)
    shards = shards_of(source, recipe.columns, client.storage, listing)
    return Dataset(source, shards, recipe, Uploads(client.storage, id))


@contextmanager
def begun(
    source: str, recipe: Recipe, client: Client, path: Path, *, update: bool
) -> Iterator[Run]:
    """A new run, or the one that this journal is of.

    With ``update`` a run that is over is begun anew, and takes over the answers to whatever has not
    changed. Raises InvalidRequest if the journal is of another dataset or of other questions, or if
    answers would go below the source.
    """
    if recipe.output is not None:
        _check_apart(recipe.output, source)
    clear_sample(path, client)
    old = id_of(path)
    renewed = old is not None and update and (_is_over(path) or is_estimate(path))
    id = f"bulk_{secrets.token_hex(8)}" if old is None or renewed else old
    dataset = dataset_of(source, recipe, client, path, id)
    if old is None or renewed:
        answers = [path] if path.exists() else []
        create(path, id, dataset, recipe, client.settings.tenant, answers)
    if old is not None and renewed:
        with suppress(S3Refused):  # what a cancelled run has left
            Uploads(client.storage, old).sweep()
        shutil.rmtree(listing_of(path, old), ignore_errors=True)
    with closing(DatasetJournal.open(path)) as journal:
        _check_same(journal, dataset)
        check_tenant(journal, client.settings.tenant)
        output = _output(journal, dataset, recipe, client)
        yield Run(journal, dataset, output)


def _check_apart(output: str, source: str) -> None:
    """Answers below the source would be rows of it the next time, or shards that it has not."""
    if output.startswith("s3://") and source.startswith("s3://"):
        is_prefix = source.endswith("/") or ending_of(source) is None
        bucket, _, key = source.removeprefix("s3://").partition("/")
        below = is_prefix and f"{output.rstrip('/')}/".startswith(f"s3://{bucket}/{key}")
    elif "s3://" in (output[:5], source[:5]):
        return
    else:
        below = Path(source).is_dir() and Path(output).resolve().is_relative_to(
            Path(source).resolve()
        )
    if below:
        raise InvalidRequest(
            f"--output {output} is below the source: give a place outside {source}"
        )


def listing_of(path: Path, id: str) -> Path:
    """Where the pictures of a folder or a prefix are listed."""
    return path.with_name(f"{path.name}.{id}.listing")


def sample_path(path: Path) -> Path:
    """The journal of an estimate's sample, while it runs."""
    return path.with_name(f".{path.name}.sample")


def clear_sample(path: Path, client: Client) -> None:
    """Removes what an estimate that was killed has left. Raises S3Unavailable."""
    scratch = sample_path(path)
    if not scratch.exists():
        return
    with suppress(InvalidRequest), closing(DatasetJournal.open(scratch)) as journal:
        run = journal.fact("run")
        if run != id_of(path):  # else it was killed when all but this was done
            with suppress(S3Refused):
                Uploads(client.storage, run).sweep()
            shutil.rmtree(listing_of(path, run), ignore_errors=True)
    remove_sample(path)


def remove_sample(path: Path) -> None:
    """Removes the journal of an estimate's sample."""
    scratch = sample_path(path)
    for suffix in ("", "-wal", "-shm"):
        scratch.with_name(scratch.name + suffix).unlink(missing_ok=True)


def id_of(path: Path) -> str | None:
    """The id of the bulk that a journal is of; None where there is no journal."""
    if not path.exists():
        return None
    with closing(DatasetJournal.open(path)) as journal:
        id: str = journal.fact("id")
        return id


def _is_over(path: Path) -> bool:
    with closing(DatasetJournal.open(path)) as journal:
        ended = journal.fact("exhausted") or journal.fact("cancelled")
        return bool(ended) and "open" not in journal.counts()


def is_estimate(path: Path) -> bool:
    """Whether a journal is of a run that has not begun: it has the answers of an estimate alone."""
    with closing(DatasetJournal.open(path)) as journal:
        return bool(journal.fact("estimate")) and not journal.fact("lines")


def create(
    path: Path,
    id: str,
    dataset: Dataset,
    recipe: Recipe,
    tenant: str | None,
    answers: Sequence[Path],
    **more: Any,
) -> None:
    """A new journal, with the answers of other journals; whole or not at all."""
    fresh = path.with_name(f".{path.name}.{id}")
    facts: dict[str, Any] = {"id": id, "manifest": dataset.name, "version": dataset.version}
    facts |= {"tenant": tenant, "recipe": recipe.model_dump(mode="json"), **more}
    with closing(DatasetJournal.create(fresh, dataset=True, **facts)) as journal:
        for each in answers:
            journal.take_over(each)
    # SQLite would apply a log that lies beside the old file to the new one.
    if path.with_name(f"{path.name}-wal").exists():
        fresh.unlink()
        raise InvalidRequest(f"another process reads {path}: try again when it has ended")
    fresh.rename(path)


def _check_same(journal: DatasetJournal, dataset: Dataset) -> None:
    if not journal.fact("dataset"):
        raise InvalidRequest(f"{journal.path} is of a manifest: give another --journal")
    if journal.fact("cancelled"):
        raise InvalidRequest(
            f"{journal.path} was cancelled: --update begins anew with what it has, or give another "
            "--journal"
        )
    if journal.fact("version") != dataset.version:
        update = "--update submits what has changed"
        if not (_is_over(journal.path) or is_estimate(journal.path)):
            cancel = blipq(f"bulk cancel {shlex.quote(str(journal.path))}")
            update = f"its run is not over: cancel it first ({cancel}), then {update}"
        raise InvalidRequest(
            f"{journal.path} is of another dataset or of other questions, or something has changed:"
            f" {update}, or give another --journal"
        )


def _output(
    journal: DatasetJournal, dataset: Dataset, recipe: Recipe, client: Client
) -> Output | None:
    wanted = [recipe.output, recipe.to, recipe.escape_formulas] if recipe.output else None
    begun = journal.fact("output")
    if begun is not None and begun != wanted:
        raise InvalidRequest(f"{journal.path} was begun with --output {begun[0]} --to {begun[1]}")
    if recipe.output is None:
        return None
    output = Output(
        journal,
        dataset.shards,
        target_of(recipe.output, client.storage),
        recipe.to,
        escape_formulas=recipe.escape_formulas,
    )
    output.check()
    journal.note(output=wanted)
    return output
