"""Waiting for many jobs: which of them to poll, and when. Pure, so that every client shares it.

Notifications say which jobs have ended. Without a subscription open jobs are polled, the one not
polled for longest first: after 50 ms, backing off to a second, and thousands in turn,
``MAX_POLLED`` of them a second. While a subscription lives that is older than their last poll, each
end is notified, and jobs are polled every five seconds: a connection can be dead and not say so.
"""

import math
import time
from collections.abc import Iterable, Sequence

from blipq.backoff import Backoff
from blipq.contract import JobInfo
from blipq.errors import JobNotFound, QueueUnavailable, ResultTimeout
from blipq.ledger.codec import Polled

POLLS = Backoff(0.05, 1.0, factor=1.5)
STEP_S = 0.25
#: Between two polls while a subscription lives.
HEARING_S = 5.0
#: The most jobs of one round trip.
MAX_POLLED = 500
#: Redis is waited for so much longer than a deadline: it expires jobs when it is back.
GRACE_S = 5.0


class Waiting:
    """Jobs that somebody waits for, until all have ended or ``timeout`` seconds have passed.

    Without a timeout the jobs' deadlines bound the wait: while Redis answers it settles what is
    past its deadline, and when it is gone for good nobody waits beyond the last one.
    ``expire_within``: seconds until that, as far as it is known before the first poll.
    """

    def __init__(
        self, ids: Iterable[str], timeout: float | None, *, expire_within: float = 7 * 86400.0
    ) -> None:
        # In the order in which to poll them.
        self.open = dict.fromkeys(ids)
        self._all = len(self.open)
        self._unseen = dict.fromkeys(self.open)
        #: All polls of what is open are later than this.
        self._polled_since = time.monotonic()
        self._subscribed = False
        self._notified: dict[str, None] = {}
        self._timeout = timeout
        self._ending = None if timeout is None else time.monotonic() + timeout
        self._last_deadline = time.monotonic() + expire_within
        self._polls = 0
        self._poll_at = time.monotonic()
        self._down: QueueUnavailable | None = None

    def notify(self, ids: Iterable[str]) -> None:
        """Poll these next: they were notified of."""
        self._notified.update((id, None) for id in ids if id in self.open)

    def due(self, watched: int = 0, subscribed_since: float | None = None) -> list[str]:
        """The jobs to poll now. ``watched``: how many jobs the whole client waits for.

        ``subscribed_since``: since when (monotonic) no end is missed; None while one may be.
        """
        self._subscribed = subscribed_since is not None
        if subscribed_since is not None and subscribed_since > self._polled_since:
            # What ended between a poll and the subscription was notified to nobody.
            self._polled_since = time.monotonic()
            self._unseen = dict.fromkeys(self.open)
        due = dict.fromkeys(_first(self._notified))
        for id in due:
            del self._notified[id]
        unseen = {} if self._down else self._unseen
        if unseen or time.monotonic() >= self._poll_at:
            due.update(dict.fromkeys(_first(unseen or self.open)))
            self._poll_at = self._next_poll(watched)
            self._polls += 1
        return list(due)

    def _next_poll(self, watched: int) -> float:
        now, count = time.monotonic(), len(self.open)
        pause = POLLS.pause_s(self._polls)
        turn = max(watched, count) / MAX_POLLED  # seconds until each job of the client was polled
        if self._subscribed:
            return now + HEARING_S * max(1.0, turn * min(count, MAX_POLLED) / count)
        if turn <= 1:
            return now + pause
        # In step with other waits of the client, so that they share round trips.
        pause = max(pause, turn * min(count, MAX_POLLED) / count)
        return math.ceil((now + pause) / STEP_S) * STEP_S

    def polled(self, ids: Sequence[str], found: Polled | QueueUnavailable) -> list[JobInfo]:
        """Takes in what a poll found; the jobs that have ended. Raises JobNotFound."""
        if isinstance(found, QueueUnavailable):
            self._down = found
            self.notify(ids)
            self._poll_at = max(self._poll_at, time.monotonic() + POLLS.first_s)
            return []
        # The others go on while a cell is away; its error is raised by a wait for its jobs alone.
        self._down = next(iter(found.away.values()), None)
        last_deadline = time.monotonic() + found.left
        if found.away or len(ids) < len(self.open):  # the others may have later ones
            last_deadline = max(last_deadline, self._last_deadline)
        self._last_deadline = last_deadline
        if self._subscribed:  # where no worker lives, a poll is what ends a job that is past it
            soonest = time.monotonic() + POLLS.first_s
            self._poll_at = min(self._poll_at, max(last_deadline, soonest))
        if found.unknown:
            raise not_found(min(found.unknown))
        for id in ids:
            if id not in found.away:
                self._unseen.pop(id, None)
            if id in self.open:  # to the end: it is the one polled last
                del self.open[id]
                self.open[id] = None
        self.notify(found.later)
        for id in found.ended:
            self.open.pop(id, None)
        return list(found.ended.values())

    def pause(self) -> float:
        """How many seconds to listen before the next poll. Raises when the time is up."""
        now = time.monotonic()
        if not self._down and (self._notified or self._unseen):
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
    return [id for id, _ in zip(ids, range(MAX_POLLED), strict=False)]
