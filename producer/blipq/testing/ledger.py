"""The ledger's ``Producer`` and ``AsyncProducer`` without Redis."""

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from blipq.contract import JobInfo, Kind, Status
from blipq.errors import BlipqError
from blipq.ledger import codec
from blipq.ledger.codec import Cancelled, Polled, Prepared, Recorded
from blipq.settings import Settings
from blipq.submission import Submission


@dataclass
class _Record:
    """A job. ``digest`` is the same for submits of the same request and options."""

    submission: Submission
    digest: str
    info: JobInfo


class Jobs:
    """The jobs of one fake, for all of its clients and its worker.

    ``notify`` is called with the id of each job that ends. Each call is atomic, as a script is.
    """

    def __init__(self, notify: Callable[[str], None]) -> None:
        self._notify = notify
        self._records: dict[str, _Record] = {}
        self._ids: dict[str, str] = {}  # by idempotency key
        self._lock = threading.RLock()

    def submissions(self) -> list[Submission]:
        """All jobs as they were submitted, in order."""
        with self._lock:
            return [record.submission for record in self._records.values()]

    def infos(self) -> list[JobInfo]:
        """All jobs as they are, in order."""
        with self._lock:
            return [record.info for record in self._records.values()]

    # -- clients --

    def submit(self, job: Prepared, max_open: int) -> Recorded | BlipqError:
        """Records a job, once."""
        with self._lock:
            return codec.recorded(job.submission, *self._submit(job, max_open))

    def _submit(self, job: Prepared, max_open: int) -> tuple[codec.Outcome, str]:
        submission, key = job.submission, codec.scoped_key(job.submission)
        for id in filter(None, (self._ids.get(key or ""), submission.id)):
            if (known := self._records.get(id)) is not None:
                return "exists" if known.digest == job.digest else "conflict", id
        if sum(not info.ended for info in self.infos()) >= max_open:
            return "full", submission.id
        now = datetime.now(UTC)
        info = JobInfo(
            id=submission.id,
            kind=Kind(submission.request.kind),
            model=submission.options.model,
            status=Status.QUEUED,
            created_at=now,
            expires_at=now + timedelta(milliseconds=job.expires_in_ms),
            metadata=submission.options.metadata,
            tenant=submission.tenant,
        )
        self._records[submission.id] = _Record(submission, job.digest, info)
        if key:
            self._ids[key] = submission.id
        return "created", submission.id

    def read(self, id: str) -> JobInfo | None:
        """A job, expired if it is due."""
        with self._lock:
            record = self._records.get(id)
            if record is None:
                return None
            if not record.info.ended and record.info.expires_at <= datetime.now(UTC):
                self._end(record, Status.EXPIRED)
            return record.info

    def cancel(self, id: str) -> Cancelled:
        """Cancels a job that has not ended."""
        with self._lock:
            info = self.read(id)
            if info is None:
                return "unknown"
            if info.ended:
                return "ended"
            self._end(self._records[id], Status.CANCELLED)
            return "cancelled"

    def release(self, id: str) -> bool:
        """Forgets a job that has ended."""
        with self._lock:
            info = self.read(id)
            if info is None or not info.ended:
                return False
            del self._records[id]
            return True

    # -- the worker --

    def begin(self, id: str) -> Submission | None:
        """Starts a job; None if it is not queued any more."""
        with self._lock:
            info = self.read(id)
            if info is None or info.status is not Status.QUEUED:
                return None
            running = {"status": Status.RUNNING, "attempts": 1, "started_at": datetime.now(UTC)}
            record = self._records[id]
            record.info = info.model_copy(update=running)
            return record.submission

    def end(self, id: str, status: Status, **fields: Any) -> bool:
        """Ends a job that runs; False if it does not."""
        with self._lock:
            info = self.read(id)
            if info is None or info.status is not Status.RUNNING:
                return False
            self._end(self._records[id], status, **fields)
            return True

    def _end(self, record: _Record, status: Status, **fields: Any) -> None:
        fields |= {"status": status, "completed_at": datetime.now(UTC)}
        record.info = record.info.model_copy(update=fields)
        self._notify(record.info.id)


class InMemoryLedger:
    """``Producer`` for one client, whose settings it has."""

    def __init__(self, jobs: Jobs, settings: Settings) -> None:
        self._jobs = jobs
        self._settings = settings

    def prepare(self, submission: Submission, *, notify: str) -> Prepared:
        """Makes a job ready to be recorded."""
        return codec.prepare(submission, self._settings, notify=notify)

    def submit(self, submission: Submission, *, notify: str) -> Recorded:
        """Records a job once."""
        (answer,) = self.submit_all([self.prepare(submission, notify=notify)])
        if isinstance(answer, BlipqError):
            raise answer
        return answer

    def submit_all(self, jobs: Sequence[Prepared]) -> list[Recorded | BlipqError]:
        """Records jobs up to the first that is refused."""
        answers: list[Recorded | BlipqError] = []
        for job in jobs:
            answers.append(self._jobs.submit(job, self._settings.max_open_jobs))
            if isinstance(answers[-1], BlipqError):
                break
        return answers

    def check_models(self, models: Iterable[str]) -> None:
        """Accepts all: the one worker serves every model."""

    def read(self, id: str) -> JobInfo | None:
        """A job as it is now; None for an unknown id."""
        info = self._jobs.read(id)
        return info if info is None or info.ended else info.model_copy(update={"live_workers": 1})

    def poll(self, ids: Sequence[str], *, notify: str) -> Polled:
        """Which of these jobs have ended. Every client is notified of each."""
        infos = {id: self._jobs.read(id) for id in ids}
        found = [info for info in infos.values() if info is not None]
        unknown = {id for id, info in infos.items() if info is None}
        now = datetime.now(UTC)
        left = [(info.expires_at - now).total_seconds() for info in found if not info.ended]
        ended = {info.id: info for info in found if info.ended}
        return Polled(ended, unknown, {}, max(left, default=0.0))

    def cancel(self, id: str) -> Cancelled:
        """Cancels a job."""
        return self._jobs.cancel(id)

    def release(self, ids: Sequence[str]) -> int:
        """Forgets jobs that have ended."""
        return sum(map(self._jobs.release, ids))

    def close(self) -> None:
        """Nothing is open."""


class InMemoryAsyncLedger:
    """``AsyncProducer`` for one client: ``InMemoryLedger``, awaited."""

    def __init__(self, jobs: Jobs, settings: Settings) -> None:
        self._ledger = InMemoryLedger(jobs, settings)

    def prepare(self, submission: Submission, *, notify: str) -> Prepared:
        """Makes a job ready to be recorded."""
        return self._ledger.prepare(submission, notify=notify)

    async def submit(self, submission: Submission, *, notify: str) -> Recorded:
        """Records a job once."""
        return self._ledger.submit(submission, notify=notify)

    async def submit_all(self, jobs: Sequence[Prepared]) -> list[Recorded | BlipqError]:
        """Records jobs up to the first that is refused."""
        return self._ledger.submit_all(jobs)

    async def check_models(self, models: Iterable[str]) -> None:
        """Accepts all: the one worker serves every model."""

    async def read(self, id: str) -> JobInfo | None:
        """A job as it is now; None for an unknown id."""
        return self._ledger.read(id)

    async def poll(self, ids: Sequence[str], *, notify: str) -> Polled:
        """Which of these jobs have ended. Every client is notified of each."""
        return self._ledger.poll(ids, notify=notify)

    async def cancel(self, id: str) -> Cancelled:
        """Cancels a job."""
        return self._ledger.cancel(id)

    async def release(self, ids: Sequence[str]) -> int:
        """Forgets jobs that have ended."""
        return self._ledger.release(ids)

    async def aclose(self) -> None:
        """Nothing is open."""
