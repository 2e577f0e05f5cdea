"""Rows a second of ``blipq bulk submit`` alone: jobs end at once, and nothing stands behind it."""

import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from blipq.bulk.driver import Driver
from blipq.contract import CaptionResult, JobInfo, Kind, Receipt, Status
from blipq.contract.results import Caption
from blipq.ledger.codec import Polled
from blipq.s3.storage import Storage
from blipq.settings import Settings
from blipq.submission import Submission
from blipq_datasets.recipe import recipe_from
from blipq_datasets.start import begun

WINDOW, PER_SHARD = 2000, 10_000


class AtOnce:
    """Stands in for a client: a job that is submitted has ended when it is looked for."""

    def __init__(self) -> None:
        self.settings = Settings()
        self.storage = Storage(self.settings)
        self.ledger = self

    def submit_many(self, submissions: Sequence[Submission]) -> list[Any]:
        """Jobs by their ids."""
        return [SimpleNamespace(id=each.id) for each in submissions]

    def poll(self, ids: Sequence[str], *, notify: str) -> Polled:
        """All of them succeeded."""
        return Polled({id: _ended(id) for id in ids}, set(), {})

    def release(self, ids: Sequence[str]) -> int:
        """Forgets nothing, as it knows nothing."""
        return len(ids)


def _ended(id: str) -> JobInfo:
    now = datetime.now(UTC)
    return JobInfo(
        id=id,
        kind=Kind.CAPTION,
        model="default",
        status=Status.SUCCEEDED,
        created_at=now,
        expires_at=now,
        result=CaptionResult(captions=(Caption(text="a photo of a street", score=0.7),)),
        receipt=Receipt(checkpoint="stand-in", revision="1", gpu_ms=0.1, cache_hit=False),
    )


def rates(rows: int) -> dict[str, Any]:
    """Rows a second from Parquet to the journal, and on to Parquet; also of CPU time.

    The latter is what a busy machine leaves as it is.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write(folder / "set", rows)
        per_s, per_cpu_s = _rate(rows, folder, None)
        with_output, with_output_cpu = _rate(rows, folder, folder / "answers")
    return {
        "rows": rows,
        "window": WINDOW,
        "journal_per_s": per_s,
        "journal_per_cpu_s": per_cpu_s,
        "parquet_per_s": with_output,
        "parquet_per_cpu_s": with_output_cpu,
    }


def _write(folder: Path, rows: int) -> None:
    folder.mkdir()
    for start in range(0, rows, PER_SHARD):
        numbers = range(start, min(start + PER_SHARD, rows))
        columns = {
            "key": [f"row-{number}" for number in numbers],
            "url": [f"s3://photos/{number:09}.jpg" for number in numbers],
            "width": [number % 4096 for number in numbers],
        }
        pq.write_table(pa.table(columns), folder / f"{start // PER_SHARD:05}.parquet")


def _rate(rows: int, folder: Path, output: Path | None) -> tuple[float, float]:
    recipe = recipe_from(None, {"output": None if output is None else str(output)})
    client: Any = AtOnce()
    path = folder / f"{'journal' if output is None else 'output'}.bulk"
    with begun(str(folder / "set"), recipe, client, path, update=False) as run:
        write = run.output.write_due if run.output else None

        def entries(number: int, position: str) -> Any:
            return run.dataset.entries(number, position, run.journal.is_known)

        started, spent = time.monotonic(), time.process_time()
        driver = Driver(client, run.journal, entries, window=WINDOW, report=_calling(write))
        driver.run()
        if run.output is not None:
            run.output.finish()
        took, spent = time.monotonic() - started, time.process_time() - spent
        assert run.journal.counts() == {"succeeded": rows}
    return rows / took, rows / spent


def _calling(write: Callable[[], None] | None) -> Callable[[Driver], None]:
    return lambda driver: write() if write else None
