"""What a run will take: from a sample of its rows, whose answers the run then has already."""

import math
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from blipq.bulk.start import check_tenant
from blipq.client.sync_client import Client
from blipq.contract import Status
from blipq.errors import InvalidRequest
from blipq.ledger.cells.operator import operator_of
from blipq.s3.refusals import S3Refused, S3Unavailable
from blipq_datasets.dataset import Dataset
from blipq_datasets.journal import DatasetJournal
from blipq_datasets.recipe import Recipe
from blipq_datasets.start import (
    clear_sample,
    create,
    dataset_of,
    id_of,
    is_estimate,
    listing_of,
    remove_sample,
    sample_path,
)
from blipq_datasets.survey import Survey, sample_of, survey

#: Standard errors to either side: 19 of 20 runs lie between.
WIDTH = 2.0
#: Drives a sample: its journal, its dataset, and how many rows it has.
Drive = Callable[[DatasetJournal, Dataset, int], None]


@dataclass(frozen=True, slots=True)
class Estimate:
    """What is left to do, in jobs, GPU-seconds and seconds, with an interval of each.

    counted: the rows are, and were not extrapolated. repeated, refused: rows without a job of their
    own. bytes: of all pictures, where their size is known. sample, failed: jobs that ran for this,
    and those of them without an answer. cache_hits: share of them. workers: live ones.
    """

    rows: int
    counted: bool
    repeated: int
    refused: int
    bytes: int | None
    jobs: int
    sample: int
    failed: int
    cache_hits: float
    gpu_s: tuple[float, float, float]
    run_s: tuple[float, float, float]
    workers: int

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it: an interval is its middle, its low and its high end."""
        return asdict(self)


class SampleJournal(DatasetJournal):
    """Also keeps when jobs ran."""

    kept = DatasetJournal.kept | {"started_at": True, "completed_at": True}


def estimate(
    source: str, recipe: Recipe, client: Client, path: Path, size: int, drive: Drive
) -> Estimate:
    """Surveys a dataset, runs a sample, and begins the journal of the run with its answers.

    Raises InvalidRequest where the run has begun, an estimate is of another tenant, or no live
    worker serves its model.
    """
    _check_replaced(path, client.settings.tenant)
    workers = _workers(client, str(recipe.options.get("model", "default")))
    scratch = sample_path(path)
    clear_sample(path, client)
    id = f"bulk_{secrets.token_hex(8)}"
    dataset = dataset_of(source, recipe, client, path, id)
    facts = {"manifest": dataset.name, "version": dataset.version, "run": id, "dataset": True}
    facts |= {"tenant": client.settings.tenant}
    sample_id = f"bulk_{secrets.token_hex(8)}"
    with closing(SampleJournal.create(scratch, id=sample_id, **facts)) as journal:
        with _known_in(path) as is_known:
            found = survey(dataset, size, is_known)
        if found.size:
            drive(journal, sample_of(dataset, found.chosen), found.size)
        made = estimate_of(found, list(journal.outcomes()), workers)
        with suppress(S3Refused, S3Unavailable):  # the run sweeps the same prefix at its end
            dataset.uploads.sweep()
    old = id_of(path)
    answers = [scratch, *([] if old is None else [path])]
    create(path, id, dataset, recipe, client.settings.tenant, answers, estimate=made.as_dict())
    if old is not None:
        shutil.rmtree(listing_of(path, old), ignore_errors=True)
    remove_sample(path)
    return made


def _check_replaced(path: Path, tenant: str | None) -> None:
    if not path.exists():
        return
    if not is_estimate(path):
        raise InvalidRequest(f"{path} is of a run that has begun: give another --journal")
    with closing(DatasetJournal.open(path)) as journal:
        check_tenant(journal, tenant)


def _workers(client: Client, model: str) -> int:
    """How many live workers serve a model. Raises InvalidRequest for none."""
    reports = operator_of(client.ledger).workers().values()
    live = sum(model in report.get("models", ()) for report in reports)
    if not live:
        raise InvalidRequest(f"no live worker serves {model!r}: an estimate runs a sample")
    return live


@contextmanager
def _known_in(path: Path) -> Iterator[Callable[[str], bool]]:
    """Whether an estimate before this one has an answer."""
    if not path.exists():
        yield lambda mark: False
        return
    with closing(DatasetJournal.open(path)) as journal:
        yield journal.is_known


def estimate_of(found: Survey, ended: Sequence[Mapping[str, Any]], workers: int) -> Estimate:
    """From a survey, and the outcomes of the sample's jobs."""
    ran = [each for each in ended if each.get("completed_at") and each.get("started_at")]
    left = max(0, found.jobs - found.size)
    receipts = [each.get("receipt") or {} for each in ran]
    hits = sum(bool(each.get("cache_hit")) for each in receipts)
    mean = found.picture_bytes / found.pictures if found.pictures else None
    gpu, error = _gpu_s([(each.get("gpu_ms") or 0.0) / 1000 for each in receipts])
    return Estimate(
        rows=found.rows,
        counted=found.counted,
        repeated=found.of_all(found.repeated),
        refused=found.of_all(found.refused),
        bytes=None if mean is None else round(mean * found.rows),
        jobs=left,
        sample=found.size,
        failed=sum(each["status"] != Status.SUCCEEDED for each in ended),
        cache_hits=hits / len(ran) if ran else 0.0,
        gpu_s=(left * gpu, left * gpu * max(0.0, 1 - error), left * gpu * (1 + error)),
        run_s=_run_s(ran, left, error),
        workers=workers,
    )


def _gpu_s(each_s: Sequence[float]) -> tuple[float, float]:
    """GPU-seconds of a job, and the error of that as a share of it."""
    mean = fmean(each_s) if each_s else 0.0
    if len(each_s) < 2 or not mean:
        return mean, 0.0
    return mean, WIDTH * stdev(each_s) / math.sqrt(len(each_s)) / mean


def _run_s(ran: Sequence[Mapping[str, Any]], left: int, error: float) -> tuple[float, float, float]:
    """Seconds for what is left, at the rate of the sample.

    A sample has a beginning in which nothing has ended yet. A long run has one, too, but it counts
    for less there: without it is the low end.
    """
    if not ran:
        return 0.0, 0.0, 0.0
    starts = [datetime.fromisoformat(each["started_at"]).timestamp() for each in ran]
    ends = [datetime.fromisoformat(each["completed_at"]).timestamp() for each in ran]
    span = max(max(ends) - min(starts), 0.001)
    first = min(ends) - min(starts)
    middle = left * span / len(ran)
    low = middle * max(0.0, 1 - error) * max(0.5, 1 - first / span)
    return middle, low, middle * (1 + error)
