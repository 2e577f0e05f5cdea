"""An operator's client of the ledger: many jobs at a glance, queues, workers and dead letters."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, cast

from blipq.contract import JobInfo, Status
from blipq.ledger import changes, codec, keys
from blipq.ledger.acting import as_one
from blipq.ledger.changes import Change, Changing
from blipq.ledger.codec import Message
from blipq.ledger.connection import redis_errors
from blipq.ledger.scripts.runner import ScriptRunner
from blipq.ledger.views.listing import Listing, Wanted
from blipq.ledger.views.tenants import TenantState, tenants

#: The most members of one index that are read for a list or purged in a round trip.
CHUNK = 1000


@dataclass(frozen=True, slots=True)
class QueueState:
    """A queue. ``oldest_s``: how long ago its oldest waiting job was published."""

    queue: str
    waiting: int
    oldest_s: float | None
    live_workers: int
    paused: bool = False

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, as JSON has them."""
        return asdict(self)

    @property
    def model(self) -> str:
        """The served model of the queue."""
        return keys.model_of(self.queue)


class OperatorLedger(ScriptRunner):
    """Reads the ledger's indexes, and changes many jobs. Raises QueueUnavailable."""

    @property
    def listing(self) -> Listing:
        """Lists of jobs, in pages."""
        return Listing(self.redis, self.settings)

    # -- jobs --

    def read(self, id: str) -> JobInfo | None:
        """A job as it is now; None for an unknown id."""
        with redis_errors(id):
            return codec.job_of(id, self._run("read", id))

    def open_jobs(self) -> int:
        """How many jobs have not ended."""
        return self._size(keys.OPEN)

    def running(self) -> int:
        """How many jobs a worker holds."""
        return self._size(keys.RUNNING)

    def delayed(self) -> int:
        """How many jobs wait for a retry."""
        return self._size(keys.DELAYED)

    def _size(self, key: str) -> int:
        with redis_errors():
            return int(self.redis.zcard(key))

    def jobs(
        self, *, status: Status | None = None, model: str | None = None, limit: int = 100
    ) -> list[JobInfo]:
        """At most ``limit`` jobs with their results, the newest first."""
        page = self.listing.page(Wanted(status=status, model=model), limit=limit)
        with redis_errors():
            return list(self._read_all(info.id for info in page.jobs))

    def request(self, id: str) -> dict[str, Any] | None:
        """A job's request as it is stored: without defaults. None for an unknown id."""
        with redis_errors(id):
            text = cast("str | None", self.redis.hget(keys.job(id), "request"))
        return None if text is None else json.loads(text)

    def ended_after(self) -> tuple[float, list[float]]:
        """The time now, and when those of the newest thousand jobs ended, the latest first.

        Unix seconds on Redis' clock.
        """
        times = self.listing.newest("completed_at", CHUNK)
        with redis_errors():
            seconds, micros = self.redis.time()
        ended = (int(time) / 1000 for time in times if time)
        return seconds + micros / 1e6, sorted(ended, reverse=True)

    def _newest(self, key: str, limit: int = CHUNK) -> list[str]:
        return cast("list[str]", self.redis.zrevrange(key, 0, limit - 1))

    def _read_all(self, ids: Iterable[str]) -> Iterator[JobInfo]:
        return (info for id in ids if (info := self.read(id)) is not None)

    # -- queues --

    def queues(self) -> list[QueueState]:
        """The state of each queue in use."""
        with redis_errors():
            seconds, micros = self.redis.time()
            return [self._queue(queue, seconds + micros / 1e6) for queue in self._queue_names()]

    def _queue_names(self) -> list[str]:
        return sorted(cast("list[str]", self.redis.zrange(keys.QUEUES, 0, -1)))

    def _queue(self, queue: str, now: float) -> QueueState:
        serving = keys.serving(keys.model_of(queue))
        first = (self.redis.zrange(key, 0, 0, withscores=True) for key in keys.waiting(queue))
        since = [score for found in first for _, score in cast("Any", found)]
        return QueueState(
            queue=queue,
            waiting=int(self.redis.zcard(keys.queued(queue))),
            oldest_s=now - min(since) / 1000 if since else None,
            live_workers=int(self.redis.zcount(serving, now * 1000, "+inf")),
            paused=self.redis.get(keys.paused(queue)) == "0",
        )

    def purge(self, queue: str) -> int:
        """Cancels the jobs that wait in a queue; returns how many.

        One that a worker claims meanwhile goes on.
        """
        cancelled = 0
        with redis_errors(), as_one():
            while ids := cast("list[str]", self.redis.zrange(keys.queued(queue), 0, CHUNK - 1)):
                cancelled += int(self._act("purge", queue, "purge", queue, *ids))
        return cancelled

    # -- tenants --

    def tenants(self) -> list[TenantState]:
        """Those that have open jobs or limits, the most open jobs first."""
        with redis_errors():
            return tenants(self.redis)

    # -- workers --

    def workers(self) -> dict[str, dict[str, Any]]:
        """The live workers by name, with what each reports of itself."""
        with redis_errors():
            names = self._worker_names()
            found = list(map(keys.worker, names))
            texts = cast("list[str | None]", self.redis.mget(found)) if found else []
        return {
            name: json.loads(text)
            for name, text in zip(names, texts, strict=True)
            if text is not None  # a dead one is taken off the list by the next beat of another
        }

    def _worker_names(self) -> list[str]:
        """Those on the list, and what serves a model: earlier versions keep no list."""
        names = cast("list[str]", self.redis.zrange(keys.WORKERS, 0, -1))
        for model in cast("list[str]", self.redis.zrange(keys.MODELS, 0, -1)):
            names += cast("list[str]", self.redis.zrange(keys.serving(model), 0, -1))
        return list(dict.fromkeys(names))

    # -- dead letters: jobs that are out of attempts --

    def dead(self) -> int:
        """How many dead letters there are."""
        return self._size(keys.DEAD_LETTERS)

    def dead_letters(self, limit: int = 100) -> list[JobInfo]:
        """At most ``limit`` dead letters, the newest first."""
        with redis_errors():
            ids = self._newest(keys.DEAD_LETTERS, limit)
        return list(self._read_all(ids))

    def retry_dead_letter(self, id: str) -> Message | None:
        """Queues a dead letter again, alone, with fresh attempts; the message to publish.

        None if the id is not one of a dead letter. Raises QueueFull.
        """
        changing = Changing(Change.of("retry", [id], dead=True))
        chunk = changing.next()
        assert chunk is not None, "an id is one chunk"
        with redis_errors(id):
            answer = self._act("retry", id, "change", *changes.arguments(chunk, self.settings))
        changed = changes.changed(answer)
        changing.took(changed)
        return next(iter(changed.messages), None)

    def drop_dead_letter(self, id: str) -> bool:
        """Deletes a dead letter and its job; False if the id is not one of a dead letter."""
        with redis_errors(id):
            return bool(self._act("drop", id, "drop", id))

    def delete(self, id: str) -> bool:
        """Deletes the record of a job that has ended.

        False if it is a dead letter, or has a webhook event that is not delivered yet.
        """
        with redis_errors(id):
            return bool(self._act("forget", id, "release", id))
