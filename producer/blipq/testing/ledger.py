"""The ledger's ``Producer`` and ``AsyncProducer`` without Redis."""

import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from blipq.contract import (
    EmbedRequest,
    JobFilter,
    JobInfo,
    Kind,
    MatchRequest,
    Options,
    Priority,
    Status,
    heat_map_place,
)
from blipq.errors import BlipqError
from blipq.ledger import codec
from blipq.ledger.changes import Change, Changed, Chunk, check_queue
from blipq.ledger.codec import Cancelled, Message, Polled, Prepared, Recorded
from blipq.ledger.erasure import Erased
from blipq.ledger.keys import queue_name
from blipq.settings import Settings
from blipq.submission import Submission

#: Of a tenant's rate, what may be used at once: see ``BURST`` of the scripts.
BURST_S = 2.0


@dataclass
class _Record:
    """A job. ``digest`` is the same for submits of the same request and options."""

    submission: Submission
    digest: str
    info: JobInfo
    priority: Priority

    @property
    def message(self) -> Message:
        """What is published of it."""
        return Message(self.info.kind, self.info.id, queue_name(self.info.model, self.priority))

    @property
    def erased(self) -> Erased:
        """What an erasure needs of it."""
        request, output = self.submission.request, self.submission.options.output
        uri = None if request.image is None else request.image.uri
        index = request.index if isinstance(request, EmbedRequest) else None
        entry = None if index is None else (index.name, index.id or uri or "")
        info = self.info
        is_part = request.image is not None and request.image.is_part
        is_explained = isinstance(request, MatchRequest) and request.explain
        heat_map = heat_map_place(output) if output and is_explained else None
        return Erased(
            info.id, info.status, uri, output, None, entry, 0, info.tenant, is_part, heat_map
        )

    def meets(self, where: JobFilter) -> bool:
        """Whether it meets every condition."""
        code = None if self.info.error is None else self.info.error.code
        found = {"code": code, "priority": self.priority, **self.info.model_dump()}
        named = where.model_dump(exclude_none=True, exclude={"metadata"})
        return (where.metadata or {}).items() <= self.info.metadata.items() and all(
            found[name] == value for name, value in named.items()
        )

    def is_for(self, change: Change) -> bool:
        """Whether a change is for a job that is where this one is."""
        match change.action:
            case "cancel":
                return not self.info.ended
            case "retry":
                return self.info.ended and self.info.status is not Status.SUCCEEDED
            case "move":
                is_queued = self.info.status is Status.QUEUED
                return is_queued and self.priority is not change.priority
            case "match":
                return True


class Jobs:
    """The jobs of one fake, for all of its clients and its worker.

    ``notify`` is called with the id of each job that ends, ``publish`` with the messages of a queue
    that is resumed. Each call is atomic, as a script is.
    """

    def __init__(
        self, notify: Callable[[str], None], publish: Callable[[list[Message]], None]
    ) -> None:
        self._notify = notify
        self._publish = publish
        self._records: dict[str, _Record] = {}
        self._ids: dict[str, str] = {}  # by idempotency key
        self._paused: set[str] = set()
        self._limits: dict[str, tuple[int | None, float | None]] = {}
        self._used_until: dict[str, float] = {}  # by tenant: see ``used_until`` of the scripts
        # Stands for Redis, which runs one script at a time. Reentrant: methods call each other.
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
            return codec.recorded(job, *self._submit(job, max_open))

    def _submit(self, job: Prepared, max_open: int) -> tuple[codec.Outcome, str]:
        submission, key = job.submission, codec.scoped_key(job.submission)
        for id in filter(None, (self._ids.get(key or ""), submission.id)):
            if (known := self._records.get(id)) is not None:
                return "exists" if known.digest == job.digest else "conflict", id
        if sum(not info.ended for info in self.infos()) >= max_open:
            return "full", submission.id
        if submission.tenant is not None and (met := self._limit_met(submission.tenant)):
            return "limited", met
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
        self._records[submission.id] = _Record(
            submission, job.digest, info, submission.options.priority
        )
        if key:
            self._ids[key] = submission.id
        return "created", submission.id

    def limit(self, tenant: str, open_jobs: int | None, rate: float | None) -> None:
        """Limits a tenant."""
        with self._lock:
            self._limits[tenant] = open_jobs, rate
            if open_jobs is None and rate is None:
                del self._limits[tenant]

    def _limit_met(self, tenant: str) -> str | None:
        """Which limit of a tenant is met, in the script's form; if none is, its rate is used."""
        none = self._limits.get(codec.ALL_OTHERS, (None, None))
        open_jobs, rate = self._limits.get(tenant, none)
        has = sum(info.tenant == tenant and not info.ended for info in self.infos())
        if open_jobs is not None and has >= open_jobs:
            return f"open_jobs {open_jobs} 1000"
        if rate is None:
            return None
        now = time.monotonic()
        ahead = max(BURST_S, 1 / rate)
        used = max(now, self._used_until.get(tenant, 0.0))
        if used > now + ahead + 0.001:  # at a lower rate
            used = now + ahead - 1 / rate
        till = used + 1 / rate
        wait = till - now - ahead
        if wait > 0:
            return f"rate {rate:.10g} {math.ceil(1000 * wait)}"
        self._used_until[tenant] = till
        return None

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

    def pause(self, queue: str) -> int:
        """Pauses a queue; how many jobs wait in it."""
        with self._lock:
            self._paused.add(queue)
            return len(self._waiting(queue))

    def resume(self, queue: str) -> int:
        """Resumes a queue; how many jobs wait in it."""
        with self._lock:
            self._paused.discard(queue)
            waiting = self._waiting(queue)
        self._publish([record.message for record in waiting])
        return len(waiting)

    def forget(self, ids: Sequence[str], *, erase: bool, only_ended: bool = False) -> list[Erased]:
        """Ends jobs, or erases them."""
        with self._lock:
            known = [self._records[id] for id in ids if self.read(id) is not None]
            found = [each for each in known if each.info.ended or not only_ended]
            erased = [record.erased for record in found]
            for record in found:
                if not record.info.ended:
                    self._end(record, Status.CANCELLED)
                if erase:
                    self._ids.pop(codec.scoped_key(record.submission) or "", None)
                    del self._records[record.info.id]
            return erased

    def named(self, uris: Sequence[str]) -> set[str]:
        """Which of these images open jobs name."""
        with self._lock:
            open_ = [each for each in self._records.values() if not each.info.ended]
            return {each.erased.image or "" for each in open_}.intersection(uris)

    def _waiting(self, queue: str) -> list[_Record]:
        waiting = [each for each in self._records.values() if each.message.queue == queue]
        return [each for each in waiting if each.info.status is Status.QUEUED]

    def change(self, chunk: Chunk, settings: Settings) -> Changed:
        """Makes all of a change at once, or a chunk of its ids."""
        change = chunk.change
        with self._lock:
            ids = chunk.ids if change.where is None else list(self._records)
            found = [self._records[id] for id in ids if self.read(id) is not None]
            meant = [each for each in found if change.where is None or each.meets(change.where)]
            eligible = [each for each in meant if each.is_for(change)]
            changed = Changed([each.info.id for each in eligible])
            if change.dry_run or change.action == "match":
                return changed
            for record in eligible:
                self._make(change, record, settings)
            if change.action != "cancel":
                changed.messages.extend(record.message for record in eligible)
            return changed

    def _make(self, change: Change, record: _Record, settings: Settings) -> None:
        if change.action == "cancel":
            self._end(record, Status.CANCELLED)
        elif change.action == "retry":
            record.info = record.info.model_copy(update=_fresh(settings))
        elif change.priority is not None:
            record.priority = change.priority

    # -- the worker --

    def begin(self, id: str) -> Submission | None:
        """Starts a job; None if it is not queued any more, or its queue is paused."""
        with self._lock:
            info = self.read(id)
            if info is None or info.status is not Status.QUEUED:
                return None
            if self._records[id].message.queue in self._paused:
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


def _fresh(settings: Settings) -> dict[str, Any]:
    """What a job that is tried again is like."""
    expires_at = datetime.now(UTC) + timedelta(seconds=settings.default_expires_in)
    gone = dict.fromkeys(("completed_at", "error", "receipt"))
    return {"status": Status.QUEUED, "expires_at": expires_at, **gone}


class InMemoryLedger:
    """``Producer`` for one client, whose settings it has."""

    def __init__(self, jobs: Jobs, settings: Settings) -> None:
        self._jobs = jobs
        self._settings = settings

    def prepare(self, submission: Submission, *, notify: str) -> Prepared:
        """Makes a job ready to be recorded."""
        return codec.prepare(submission, self._settings, notify=notify)

    def make_id(self, options: Options) -> str:
        """An id for a new job."""
        return codec.made_id(self._settings)

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

    def pause(self, queue: str) -> int:
        """Lets the worker take no job from a queue."""
        check_queue(queue)
        return self._jobs.pause(queue)

    def resume(self, queue: str) -> int:
        """Lets the worker take jobs from a queue again."""
        check_queue(queue)
        return self._jobs.resume(queue)

    def limit(self, tenant: str, open_jobs: int | None, rate: float | None) -> None:
        """Limits a tenant."""
        codec.limit_arguments(tenant, open_jobs, rate)  # raises for what is wrong
        self._jobs.limit(tenant, open_jobs, rate)

    def change(self, chunk: Chunk) -> Changed:
        """Makes one chunk of a change."""
        return self._jobs.change(chunk, self._settings)

    def forget(self, ids: Sequence[str], *, erase: bool, only_ended: bool = False) -> list[Erased]:
        """Ends jobs, or erases them."""
        return self._jobs.forget(ids, erase=erase, only_ended=only_ended)

    def named(self, uris: Sequence[str]) -> set[str]:
        """Which of these images open jobs name."""
        return self._jobs.named(uris)

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

    async def make_id(self, options: Options) -> str:
        """An id for a new job."""
        return self._ledger.make_id(options)

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

    async def pause(self, queue: str) -> int:
        """Lets the worker take no job from a queue."""
        return self._ledger.pause(queue)

    async def resume(self, queue: str) -> int:
        """Lets the worker take jobs from a queue again."""
        return self._ledger.resume(queue)

    async def limit(self, tenant: str, open_jobs: int | None, rate: float | None) -> None:
        """Limits a tenant."""
        self._ledger.limit(tenant, open_jobs, rate)

    async def change(self, chunk: Chunk) -> Changed:
        """Makes one chunk of a change."""
        return self._ledger.change(chunk)

    async def forget(
        self, ids: Sequence[str], *, erase: bool, only_ended: bool = False
    ) -> list[Erased]:
        """Ends jobs, or erases them."""
        return self._ledger.forget(ids, erase=erase, only_ended=only_ended)

    async def named(self, uris: Sequence[str]) -> set[str]:
        """Which of these images open jobs name."""
        return self._ledger.named(uris)

    async def release(self, ids: Sequence[str]) -> int:
        """Forgets jobs that have ended."""
        return self._ledger.release(ids)

    async def aclose(self) -> None:
        """Nothing is open."""
