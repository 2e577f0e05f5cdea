"""Submits a manifest's lines and collects what becomes of them, a window of jobs at a time."""

import hashlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from typing import TypeVar

from blipq.backoff import Backoff
from blipq.bulk.journal import REFUSED, Journal, OpenLine
from blipq.bulk.manifest import Entry, read_work
from blipq.bulk.manners import POLITE, Hosts, Manners, Pace
from blipq.client.recording import AWAY, record_all
from blipq.client.sync_client import Client
from blipq.contract import JobInfo, Status
from blipq.errors import BlipqError, JobNotFound, QueueFull, QueueUnavailable
from blipq.submission import Submission, id_of

ItemT = TypeVar("ItemT")

#: Lines noted, submitted and collected in one go.
CHUNK = 200
POLLS = Backoff(0.05, 1.0, factor=1.5)
#: How often all jobs in flight are looked at.
WHOLE_EVERY_S = 2.0
#: Outcomes that a terminal shows.
NEWEST = 2


def job_id_of(bulk: str, entry: Entry) -> str:
    """A line's job: the same however often the line is submitted (a UUIDv8)."""
    text = f"{bulk}\n{entry.number}\n{entry.custom_id}"
    digest = hashlib.sha256(text.encode()).digest()
    return id_of(int.from_bytes(digest[:16], "big"), version=8)


class Driver:
    """The one process that works on a bulk.

    ``entries`` reads the manifest from behind a line's number and position.
    ``report`` is called after each step; the journal has the counts.
    """

    def __init__(
        self,
        client: Client,
        journal: Journal,
        entries: Callable[[int, str], Iterator[Entry]],
        *,
        window: int,
        manners: Manners = POLITE,
        report: Callable[["Driver"], None] = lambda driver: None,
    ) -> None:
        self.counts = journal.counts()
        self.counts.pop("open", None)
        self.trouble: BlipqError | None = None
        self.lines: int = journal.fact("lines")
        self.position: str = journal.fact("position")
        self.exhausted: bool = journal.fact("exhausted") or False
        self.paused = False
        #: What succeeded last, the latest at the end.
        self.newest: deque[JobInfo] = deque(maxlen=NEWEST)
        self._client = client
        self._journal = journal
        self._read = entries
        self._window = window
        self._report = report
        self._manners = manners
        self._pace = Pace(manners.rate)
        self._hosts = Hosts(manners.host_rate)
        self._bulk: str = journal.fact("id")
        self._entries: Iterator[Entry] | None = None
        self._in_flight: dict[str, int] = {}
        self._lost: set[str] = set()
        self._cancelled = False
        self._whole_at = 0.0

    @property
    def in_flight(self) -> int:
        """Jobs that are submitted and not collected."""
        return len(self._in_flight)

    @property
    def waiting(self) -> int:
        """Lines that wait until their picture's host may be visited again."""
        return len(self._hosts)

    def run(self) -> None:
        """Until every line has ended, none is open after a cancel, or the time is over.

        Then jobs that are in flight are collected, and lines that are not submitted stay open.
        """
        self._resume(self._journal.open_lines())
        idle = 0
        while self._goes_on(more := self._fill()):
            idle = 0 if self._collect() else idle + 1
            self._submit_waiting()
            self._submit_again()
            self._cancel_if_asked()
            self._report(self)
            if more or self._in_flight or self._hosts or self._lost:
                time.sleep(POLLS.pause_s(idle))
        self._journal.note(exhausted=self.exhausted)
        self._report(self)

    def _goes_on(self, more: bool) -> bool:
        waits = bool(self._hosts or self._lost) and not self._manners.is_over
        to_cancel = bool(self._lost) and self._cancelled
        return bool(more or waits or to_cancel or self._in_flight)

    def _resume(self, lines: Sequence[OpenLine]) -> None:
        """Jobs that a driver before this one may have recorded: they are found again.

        It may have died before it released those that it collected last. Those that Redis does not
        know are submitted as those that it has lost.
        """
        self._release(self._journal.fact("collected") or [])
        self._in_flight |= {line.job_id: line.number for line in lines}
        self._cancel_if_asked()

    # -- submitting --

    def _fill(self) -> bool:
        """Submits lines until the window is full; whether there may be more."""
        self.paused = bool(self._journal.fact("paused"))
        while not (self.exhausted or self._cancelled or self._manners.is_over):
            room = self._window - len(self._in_flight) - len(self._hosts) - len(self._lost)
            room = self._pace.room(min(CHUNK, room))
            if self.paused or room <= 0:
                return True
            if entries := self._next(room):
                self._pace.took(len(entries))
                self._add(entries)
            self._report(self)
        return False

    def _next(self, count: int) -> list[Entry]:
        """The next entries of the manifest, however long S3 is away."""
        while True:
            try:
                if self._entries is None:
                    self._entries = self._read(self.lines, self.position)
                entries = list(itertools.islice(self._entries, count))
            except QueueUnavailable as error:
                self._entries = None
                self._wait(error, AWAY.last_s)
                continue
            self.exhausted = len(entries) < count
            return entries

    def _add(self, entries: Sequence[Entry]) -> None:
        ids = [job_id_of(self._bulk, entry) for entry in entries]
        lines, ended = self._journal.add(entries, ids)
        self.lines, self.position = entries[-1].number, entries[-1].position
        for status, number in ended.items():
            self._count(status, number)
        self._submit(lines)

    def _submit(self, lines: Sequence[OpenLine]) -> None:
        """Submits lines, but those whose pictures would come from one host too fast."""
        for chunk in _chunks(self._hosts.admitted(lines)):
            self._record(chunk)

    def _submit_waiting(self) -> None:
        if self._hosts and not (self.paused or self._manners.is_over):
            self._submit([])

    def _record(self, lines: Sequence[OpenLine]) -> None:
        tenant = self._client.settings.tenant
        submissions = [Submission(*read_work(line.work), line.job_id, tenant) for line in lines]
        answers = record_all(self._client, submissions, self._wait)
        refused = []
        for line, answer in zip(lines, answers, strict=True):
            if isinstance(answer, str):
                self._in_flight[answer] = line.number
            else:
                refused.append((line.number, str(answer)))
        self._journal.refuse(refused)
        self._count(REFUSED, len(refused))
        self.trouble = None

    def _wait(self, why: BlipqError, seconds: float) -> None:
        """While the queue is full or away. Collecting meanwhile may be what makes room."""
        self.trouble = why
        self._collect()
        self._report(self)
        time.sleep(seconds)

    def _submit_again(self) -> None:
        """Jobs that Redis has lost, or kept for too short a time, or never had.

        Not while the bulk is paused or its time is over; of one that is cancelled they end.
        """
        if not self._cancelled and (self.paused or self._manners.is_over):
            return
        lost, self._lost = self._lost, set()
        lines = [line for line in self._journal.open_lines() if line.job_id in lost] if lost else []
        if self._cancelled:
            self._journal.cancel([line.number for line in lines])
            self._count(Status.CANCELLED, len(lines))
            return
        for chunk in _chunks(lines):
            self._submit(chunk)

    # -- collecting --

    def _collect(self) -> int:
        """Takes in which jobs have ended, and forgets them in Redis; how many those are.

        The oldest end first, mostly: behind a chunk without an end it looks only now and then.
        """
        collected = 0
        whole = time.monotonic() >= self._whole_at
        if whole:
            self._whole_at = time.monotonic() + WHOLE_EVERY_S
        for ids in _chunks(list(self._in_flight)):
            try:
                found = self._client.ledger.poll(ids, notify=self._bulk)
            except (QueueUnavailable, QueueFull) as error:
                self.trouble = error
                return collected
            self._end(found.ended.values())
            for id in found.unknown:
                del self._in_flight[id]
                self._lost.add(id)
            collected += len(found.ended)
            if not (found.ended or whole):
                break
        return collected

    def _end(self, infos: Collection[JobInfo]) -> None:
        if not infos:
            return
        self._journal.end([(self._in_flight.pop(info.id), info) for info in infos])
        for info in infos:
            self._count(info.status, 1)
        self.newest.extend(info for info in infos if info.status is Status.SUCCEEDED)
        self._release([info.id for info in infos])

    def _release(self, ids: Sequence[str]) -> None:
        if ids:
            with suppress(QueueUnavailable, QueueFull):  # then they go when their time is up
                self._client.ledger.release(ids)

    def _count(self, status: str, more: int) -> None:
        if more:
            self.counts[status] = self.counts.get(status, 0) + more

    # -- cancelling --

    def _cancel_if_asked(self) -> None:
        if self._cancelled or not self._journal.fact("cancelled"):
            return
        self._cancelled = True
        # A driver before this one may have submitted them.
        self._in_flight |= {line.job_id: line.number for line in self._hosts.all()}
        for id in list(self._in_flight):
            self._cancel(id)

    def _cancel(self, id: str) -> None:
        for tries in itertools.count():
            try:
                self._client.job(id).cancel()
                return
            except JobNotFound:
                del self._in_flight[id]
                self._lost.add(id)
                return
            except (QueueUnavailable, QueueFull) as error:
                self.trouble = error
                self._report(self)
                time.sleep(AWAY.pause_s(tries))


def _chunks(items: Sequence[ItemT]) -> Iterator[Sequence[ItemT]]:
    for start in range(0, len(items), CHUNK):
        yield items[start : start + CHUNK]
