"""Many jobs at a glance, for operators: what is open, what ended lately, what waits where."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, cast

from blipq.contract import TERMINAL_STATUSES, JobInfo, Status
from blipq.ledger import keys
from blipq.ledger.connection import redis_errors
from blipq.ledger.operator import OperatorLedger

#: Open jobs that are looked at for a list, the latest deadlines first.
LOOK_AT = 1000


@dataclass(frozen=True, slots=True)
class QueueState:
    """A queue. ``oldest_s``: how long ago its oldest waiting job was published."""

    queue: str
    waiting: int
    oldest_s: float | None
    live_workers: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Overview:
    """Reads the ledger's indexes. Raises QueueUnavailable."""

    def __init__(self, ledger: OperatorLedger) -> None:
        self._ledger = ledger
        self._redis: Any = ledger.redis

    def open_jobs(self) -> int:
        """How many jobs have not ended."""
        with redis_errors():
            return int(self._redis.zcard(keys.OPEN))

    def jobs(
        self, *, status: Status | None = None, model: str | None = None, limit: int = 100
    ) -> list[JobInfo]:
        """Jobs, the newest first: of those that ended, the last thousand are known."""
        with redis_errors():
            ids = dict.fromkeys(self._candidates(status))
        infos = [info for id in ids if (info := self._ledger.read(id)) is not None]
        chosen = [
            info for info in infos if status in (None, info.status) and model in (None, info.model)
        ]
        return sorted(chosen, key=lambda info: info.created_at, reverse=True)[:limit]

    def _candidates(self, status: Status | None) -> Iterator[str]:
        if status is Status.RUNNING:
            yield from self._newest(keys.RUNNING)
        elif status is Status.QUEUED:
            for queue in self._queues():
                yield from self._newest(keys.queued(queue))
            yield from self._newest(keys.DELAYED)
        elif status is None:
            yield from self._newest(keys.OPEN)
        if status is None or status in TERMINAL_STATUSES:
            yield from self._newest(keys.RECENT)

    def _newest(self, key: str) -> list[str]:
        return cast("list[str]", self._redis.zrevrange(key, 0, LOOK_AT - 1))

    def _queues(self) -> list[str]:
        return sorted(self._redis.zrange(keys.QUEUES, 0, -1))

    def queues(self) -> list[QueueState]:
        with redis_errors():
            seconds, micros = self._redis.time()
            return [self._queue(queue, seconds + micros / 1e6) for queue in self._queues()]

    def _queue(self, queue: str, now: float) -> QueueState:
        first = (self._redis.zrange(key, 0, 0, withscores=True) for key in keys.waiting(queue))
        since = [score for found in first for _, score in found]
        return QueueState(
            queue=queue,
            waiting=self._redis.zcard(keys.queued(queue)),
            oldest_s=now - min(since) / 1000 if since else None,
            live_workers=self._redis.zcount(keys.serving(keys.model_of(queue)), now * 1000, "+inf"),
        )

    def delayed(self) -> int:
        """How many jobs wait for a retry."""
        with redis_errors():
            return int(self._redis.zcard(keys.DELAYED))

    def running(self) -> int:
        """How many jobs a worker holds."""
        with redis_errors():
            return int(self._redis.zcard(keys.RUNNING))

    def purge(self, queue: str) -> int:
        """Cancels the jobs that wait in a queue; how many those were.

        One that a worker takes meanwhile goes on.
        """
        cancelled = 0
        while True:
            with redis_errors():
                ids = self._redis.zrange(keys.queued(queue), 0, LOOK_AT - 1)
            if not ids:
                return cancelled
            cancelled += self._ledger.purge(queue, ids)
