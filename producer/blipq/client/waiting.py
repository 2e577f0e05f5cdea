"""Waiting for many jobs: which of them to look at, and when. Pure, so that every client shares it.

Whoever waits is told of jobs that have ended. A notification can be lost, so open jobs are also
looked at unasked, the one not looked at for longest first: after 50 ms, backing off to a second,
and thousands in turn, ``LOOK_AT`` of them a second.
"""

import math
import time
from collections.abc import Iterable, Sequence

from blipq.backoff import Backoff
from blipq.contract import JobInfo
from blipq.errors import JobNotFound, QueueUnavailable, ResultTimeout
from blipq.ledger.codec import Looked

POLLS = Backoff(0.05, 1.0, factor=1.5)
STEP_S = 0.25
#: The most jobs that one round trip asks about.
LOOK_AT = 500
#: Redis is waited for so much longer than a deadline: it settles what has expired when it is back.
GRACE_S = 5.0


class Waiting:
    """Jobs that somebody waits for, until all have ended or ``timeout`` seconds have passed.

    Without a timeout the jobs' deadlines bound the wait: while Redis answers it settles what is
    past its deadline, and when it is gone for good nobody waits beyond the last one.
    ``expire_within``: seconds until that, as far as it is known before the first look.
    """

    def __init__(
        self, ids: Iterable[str], timeout: float | None, *, expire_within: float = 7 * 86400.0
    ) -> None:
        # In the order in which to look at them.
        self.open = dict.fromkeys(ids)
        self._all = len(self.open)
        self._unseen = dict.fromkeys(self.open)
        self._told: dict[str, None] = {}
        self._timeout = timeout
        self._ending = None if timeout is None else time.monotonic() + timeout
        self._last_deadline = time.monotonic() + expire_within
        self._polls = 0
        self._poll_at = time.monotonic()
        self._down: QueueUnavailable | None = None

    def tell(self, ids: Iterable[str]) -> None:
        """Look at these next."""
        self._told.update((id, None) for id in ids if id in self.open)

    def due(self, watched: int = 0) -> list[str]:
        """The jobs to look at now. ``watched``: how many jobs the whole client waits for."""
        chosen = dict.fromkeys(_first(self._told))
        for id in chosen:
            del self._told[id]
        unseen = {} if self._down else self._unseen
        if unseen or time.monotonic() >= self._poll_at:
            chosen.update(dict.fromkeys(_first(unseen or self.open)))
            self._poll_at = self._next_poll(watched)
            self._polls += 1
        return list(chosen)

    def _next_poll(self, watched: int) -> float:
        now, count = time.monotonic(), len(self.open)
        pause = POLLS.pause_s(self._polls)
        turn = max(watched, count) / LOOK_AT  # seconds until each job of the client was looked at
        if turn <= 1:
            return now + pause
        # In step with other waits of the client, so that they share round trips.
        pause = max(pause, turn * min(count, LOOK_AT) / count)
        return math.ceil((now + pause) / STEP_S) * STEP_S

    def looked(self, ids: Sequence[str], found: Looked | QueueUnavailable) -> list[JobInfo]:
        """Takes in what a look found; the jobs that have ended. Raises JobNotFound."""
        if isinstance(found, QueueUnavailable):
            self._down = found
            self.tell(ids)
            self._poll_at = max(self._poll_at, time.monotonic() + POLLS.first_s)
            return []
        self._down = None
        last_deadline = time.monotonic() + found.left
        if len(ids) < len(self.open):  # the others may have later ones
            last_deadline = max(last_deadline, self._last_deadline)
        self._last_deadline = last_deadline
        if found.unknown:
            raise not_found(min(found.unknown))
        for id in ids:
            self._unseen.pop(id, None)
            if id in self.open:  # to the end: it is the one looked at last
                del self.open[id]
                self.open[id] = None
        for id in found.ended:
            self.open.pop(id, None)
        return list(found.ended.values())

    def pause(self) -> float:
        """How many seconds to listen before the next look. Raises when the time is up."""
        now = time.monotonic()
        if not self._down and (self._told or self._unseen):
            return 0.0
        left = self._poll_at - now
        if self._ending is None:
            if self._down and now >= self._last_deadline + GRACE_S:
                raise self._down
        else:
            if now >= self._ending:
                raise self._down or self._timed_out()
            left = min(left, self._ending - now)
        return max(0.0, left)

    def _timed_out(self) -> ResultTimeout:
        text = f"{len(self.open)} of {self._all} jobs have not ended after {self._timeout:g} s"
        return ResultTimeout(text, next(iter(self.open)))


def not_found(id: str) -> JobNotFound:
    """The error for an id that the ledger does not know."""
    return JobNotFound(f"no job {id}: never submitted, or past its retention")


def _first(ids: Iterable[str]) -> list[str]:
    return [id for id, _ in zip(ids, range(LOOK_AT), strict=False)]
