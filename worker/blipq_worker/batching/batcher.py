"""Runs items together, one Future each. Knows no Celery, torch or BLIP-2.

One thread owns the model. Items of most keys run in batches: the thread takes the most urgent
waiting item, gathers others of the same key, and runs them together; while a batch runs the next
one fills by itself, so the window matters only when the model is idle. Items of other keys join a
``Session`` and leave it one by one: between two steps whoever is done goes and whoever waits comes.
"""

import bisect
import itertools
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")
ItemIn = TypeVar("ItemIn", contravariant=True)
AnswerOut = TypeVar("AnswerOut", covariant=True)

#: Stands for an item; of two tickets the smaller is the more urgent one.
Ticket = tuple[int, int]

#: How many times as long as the last batch took the sessions run before a less urgent one.
_LESS_URGENT_WAITS = 4


class BatcherFull(Exception):
    """No room among the waiting items within the timeout."""


class BatcherClosed(Exception):
    """The batcher takes no more items."""


class Session(Protocol[ItemIn, AnswerOut]):
    """Items that run together and need neither start nor end together. Of one thread."""

    def has_room(self, ticket: Ticket) -> bool:
        """Whether an item of this urgency would be at work soon."""

    def join(self, ticket: Ticket, item: ItemIn) -> None:
        """Takes an item in. If it raises, the item fails."""

    def leave(self, ticket: Ticket) -> None:
        """Lets an item go, whatever it has come to. Does not raise."""

    def step(self, tickets: Sequence[Ticket]) -> Sequence[tuple[Ticket, AnswerOut]]:
        """Takes these items one step further; the answers of those that are done and have left.

        If it raises, the batcher tries halves of them until the item that raises is alone: a step
        that raised must be one that can be taken again.
        """


class Run(Protocol[ItemIn, AnswerOut]):
    def __call__(
        self, key: Hashable, items: Sequence[ItemIn], wanted: Callable[[int], bool]
    ) -> Sequence[AnswerOut]:
        """One answer per item, in order. ``wanted(i)`` says whether anyone waits for item ``i``."""


class Judge(Protocol):
    """Hears how items fare, on the batcher's thread, and says whether to go on."""

    def failed(self, key: Hashable, item: Any, error: Exception) -> None:
        """Items of a key failed; ``item``: the one that failed alone, or None. May not return."""

    def answered(self, key: Hashable) -> None:
        """Items of a key were answered."""

    def doubts(self) -> bool:
        """Whether the model is to be checked: nothing starts until then."""

    def trusts(self) -> bool:
        """Checks the model. False ends the batcher's thread: what waits is left to its owner."""


class Trusting:
    """A judge without doubts."""

    def failed(self, key: Hashable, item: Any, error: Exception) -> None: ...

    def answered(self, key: Hashable) -> None: ...

    def doubts(self) -> bool:
        return False

    def trusts(self) -> bool:
        return True


@dataclass(order=True, slots=True)
class _Entry(Generic[Item, Answer]):
    """An item; entries sort by urgency, then by arrival. Times are of the monotonic clock."""

    ticket: Ticket
    key: Hashable = field(compare=False)
    item: Item = field(compare=False)
    arrived: float = field(compare=False)
    deadline: float | None = field(compare=False)
    # It stays pending while its item runs, so that it can be cancelled until there is an answer.
    future: "Future[Answer]" = field(compare=False)
    # Whether it takes one of the places for items that wait.
    placed: bool = field(compare=False, default=True)

    @property
    def priority(self) -> int:
        return self.ticket[0]

    def wanted(self) -> bool:
        """Whether anyone waits for the answer; gives it up itself at the deadline."""
        if self.deadline is not None and time.monotonic() >= self.deadline:
            self.future.cancel()
        return not self.future.cancelled()


@dataclass(slots=True)
class _Running(Generic[Item, Answer]):
    """A session and the items in it."""

    session: Session[Item, Answer]
    entries: dict[Ticket, _Entry[Item, Answer]] = field(default_factory=dict)


class Batcher(Generic[Item, Answer]):
    """Runs items with ``run`` in batches, and in sessions where their key has one.

    sessions: the keys whose items join and leave, and how to open a session. max_batch_size: most
    items in one batch. max_batch_cost: their highest ``cost`` together; an item alone may cost
    more. batch_wait_timeout_s: longest the first item of a batch waits for company. max_waiting:
    items beyond which ``submit`` blocks. judge: stops it where the fault is not an item's. name:
    what its thread is called, after "blipq-".

    A batch or a step that raises is halved and run again until the item that raises is alone: it
    gets the exception, the others their answers.
    """

    def __init__(
        self,
        run: Run[Item, Answer],
        *,
        max_batch_size: int,
        batch_wait_timeout_s: float = 0.0,
        max_waiting: int = 64,
        sessions: Mapping[Hashable, Callable[[], Session[Item, Answer]]] | None = None,
        cost: Callable[[Item], int] = lambda item: 1,
        max_batch_cost: float = float("inf"),
        judge: Judge | None = None,
        name: str = "batcher",
    ) -> None:
        self._run = run
        self._max_batch_size = max_batch_size
        self._window = batch_wait_timeout_s
        self._openers = dict(sessions or {})
        self._cost = cost
        self._max_batch_cost = max_batch_cost
        self._judge = judge or Trusting()
        self._room = threading.Semaphore(max_waiting)
        self._waiting: list[_Entry[Item, Answer]] = []  # most urgent first
        self._changed = threading.Condition()
        self._orders = itertools.count()
        self._closed = False
        self._busy_since: float | None = None
        self._sessions: dict[Hashable, _Running[Item, Answer]] = {}
        self._in_batch = 0
        self._batch_took = 0.0
        self._batch_ended = 0.0
        self._thread = threading.Thread(target=self._loop, name=f"blipq-{name}", daemon=True)

    def start(self) -> None:
        """Starts the thread that owns the model."""
        self._thread.start()

    def submit(
        self,
        item: Item,
        key: Hashable,
        *,
        priority: int = 0,
        timeout: float | None = None,
        deadline: float | None = None,
    ) -> "Future[Answer]":
        """Adds an item; smaller ``priority`` first. Raises BatcherFull and BatcherClosed.

        A Future that is cancelled before its item runs costs nothing; later the item stops at the
        next step. At the ``deadline`` (monotonic) it is cancelled by itself.
        """
        if not self._room.acquire(timeout=timeout):
            raise BatcherFull(f"no room for {timeout} s")
        future: Future[Answer] = Future()
        ticket = priority, next(self._orders)
        entry = _Entry(ticket, key, item, time.monotonic(), deadline, future)
        with self._changed:
            if self._closed:
                self._room.release()
                raise BatcherClosed
            bisect.insort(self._waiting, entry)
            self._changed.notify()
        return future

    def stalled_for(self) -> float:
        """Seconds since what runs last made progress; 0 when nothing runs."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    @property
    def waiting(self) -> int:
        """Items that wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Items that run."""
        return self._in_batch + sum(len(each.entries) for each in list(self._sessions.values()))

    def progress(self) -> None:
        """Says that what runs is alive: a decode step or a pass is done."""
        if self._busy_since is not None:
            self._busy_since = time.monotonic()

    def close(self, timeout: float | None = None) -> None:
        """Runs what waits, then stops. Items that come later are refused."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout)

    # -- the batcher's thread --

    def _loop(self) -> None:
        """Turn by turn: items leave and join, a batch runs if it is its turn, sessions step."""
        trusted = True
        while trusted and self._wait():
            self._busy_since = time.monotonic()
            self._turn()
            if self._judge.doubts():
                trusted = self._is_trusted()
            if not self._sessions:
                self._busy_since = None

    def _turn(self) -> None:
        self._let_go()
        while not self._judge.doubts() and (entry := self._next_to_join()) is not None:
            self._join(entry)
        if batch := self._next_batch():
            self._answer_batch(batch)
        for key, running in self._sessions.items():
            if running.entries:
                self._step(key, running, list(running.entries))
        self._sessions = {key: each for key, each in self._sessions.items() if each.entries}

    def _is_trusted(self) -> bool:
        """Has the model checked, alone: what was in sessions waits, and begins again after that."""
        for running in self._sessions.values():
            for ticket in running.entries:
                running.session.leave(ticket)
            self._put_back(list(running.entries.values()))
        self._sessions = {}
        return self._judge.trusts()

    def _put_back(self, entries: list[_Entry[Item, Answer]]) -> None:
        with self._changed:
            for entry in entries:
                bisect.insort(self._waiting, entry)

    def _wait(self) -> bool:
        """Waits until there is something to do; False when closed and empty."""
        with self._changed:
            while not self._sessions and self._idle_for() > 0:
                if self._closed and not self._waiting:
                    return False
                self._changed.wait(None if not self._waiting else self._idle_for())
            return True

    def _idle_for(self) -> float:
        """Seconds until a waiting item must run, where no session does."""
        if any(entry.key in self._openers for entry in self._waiting):
            return 0.0
        return self._due_in(self._waiting[0]) if self._waiting else float("inf")

    def _due_in(self, first: _Entry[Item, Answer]) -> float:
        """Seconds for which the batch of an item may still wait for company."""
        if self._closed or self._is_full(first.key):
            return 0.0
        return max(0.0, first.arrived + self._window - time.monotonic())

    # -- sessions --

    def _let_go(self) -> None:
        """Items that nobody waits for leave."""
        for running in self._sessions.values():
            for ticket in [each for each, entry in running.entries.items() if not entry.wanted()]:
                del running.entries[ticket]
                running.session.leave(ticket)

    def _next_to_join(self) -> _Entry[Item, Answer] | None:
        with self._changed:
            for entry in self._waiting:
                if entry.key in self._openers and self._may_join(entry):
                    self._remove([entry])
                    return entry
        return None

    def _may_join(self, entry: _Entry[Item, Answer]) -> bool:
        running = self._sessions.get(entry.key)
        return running is None or not entry.wanted() or running.session.has_room(entry.ticket)

    def _join(self, entry: _Entry[Item, Answer]) -> None:
        if not entry.wanted():
            return
        running = self._sessions.get(entry.key)
        try:
            if running is None:
                running = self._sessions[entry.key] = _Running(self._openers[entry.key]())
            running.session.join(entry.ticket, entry.item)
        except Exception as error:
            self._judge.failed(entry.key, entry.item, error)
            _settle(entry.future.set_exception, error)
        else:
            running.entries[entry.ticket] = entry

    def _step(self, key: Hashable, running: _Running[Item, Answer], tickets: list[Ticket]) -> None:
        if self._judge.doubts():
            return
        try:
            answers = running.session.step(tickets)
        except Exception as error:
            alone = running.entries[tickets[0]].item if len(tickets) == 1 else None
            self._judge.failed(key, alone, error)
            if len(tickets) == 1:
                running.session.leave(tickets[0])
                _settle(running.entries.pop(tickets[0]).future.set_exception, error)
                return
        else:
            self.progress()
            if answers:
                self._judge.answered(key)
            for ticket, answer in answers:
                _settle(running.entries.pop(ticket).future.set_result, answer)
            return
        # Not in the handler: there the error would keep the memory that halves may need.
        self.progress()
        middle = len(tickets) // 2
        self._step(key, running, tickets[:middle])
        self._step(key, running, tickets[middle:])

    # -- batches --

    def _next_batch(self) -> list[_Entry[Item, Answer]]:
        """The batch whose turn it is; empty if there is none."""
        with self._changed:
            first = next((each for each in self._waiting if each.key not in self._openers), None)
            if first is None or self._due_in(first) > 0 or not self._has_turn(first):
                return []
            batch = self._company(first.key)
            self._remove(batch)
        return [entry for entry in batch if entry.wanted()]

    def _has_turn(self, first: _Entry[Item, Answer]) -> bool:
        """Whether a batch may interrupt the sessions.

        A more urgent one may at once, an equal one when they ran as long as the last batch.
        """
        inside = [
            entry for running in self._sessions.values() for entry in running.entries.values()
        ]
        if not inside:
            return True
        outside = [entry for entry in self._waiting if entry.key in self._openers]
        most_urgent = min(inside + outside).priority
        if first.priority < most_urgent:
            return True
        share = 1 if first.priority == most_urgent else _LESS_URGENT_WAITS
        return time.monotonic() - self._batch_ended >= share * self._batch_took

    def _company(self, key: Hashable) -> list[_Entry[Item, Answer]]:
        """The most urgent entries of a key, as many as fit into a batch."""
        batch: list[_Entry[Item, Answer]] = []
        left = self._max_batch_cost
        for entry in self._waiting:
            if entry.key != key:
                continue
            left -= self._cost(entry.item)
            if len(batch) == self._max_batch_size or (batch and left < 0):
                break
            batch.append(entry)
        return batch

    def _is_full(self, key: Hashable) -> bool:
        batch = self._company(key)
        waiting = sum(entry.key == key for entry in self._waiting)
        return len(batch) == self._max_batch_size or len(batch) < waiting

    def _remove(self, entries: list[_Entry[Item, Answer]]) -> None:
        """Takes entries out of those that wait."""
        gone = {entry.ticket for entry in entries}
        self._waiting = [entry for entry in self._waiting if entry.ticket not in gone]
        for entry in entries:
            if entry.placed:
                self._room.release()
            entry.placed = False

    def _answer_batch(self, batch: list[_Entry[Item, Answer]]) -> None:
        started, self._in_batch = time.monotonic(), len(batch)
        self._answer(batch)
        self._in_batch = 0
        self._batch_ended = time.monotonic()
        self._batch_took = self._batch_ended - started

    def _answer(self, batch: list[_Entry[Item, Answer]]) -> None:
        if self._judge.doubts():
            self._put_back(batch)
            return
        items = [entry.item for entry in batch]
        try:
            answers = self._run(batch[0].key, items, lambda index: batch[index].wanted())
            if len(answers) != len(batch):
                raise RuntimeError(f"{len(answers)} answers for {len(batch)} items")
        except Exception as error:
            self._judge.failed(batch[0].key, items[0] if len(batch) == 1 else None, error)
            if len(batch) == 1:
                _settle(batch[0].future.set_exception, error)
                return
        else:
            self.progress()
            self._judge.answered(batch[0].key)
            for entry, answer in zip(batch, answers, strict=True):
                _settle(entry.future.set_result, answer)
            return
        self.progress()
        middle = len(batch) // 2
        self._answer(batch[:middle])
        self._answer(batch[middle:])


def _settle(settle: Callable[[Any], None], value: Any) -> None:
    """Sets a Future unless its waiter has given up on it."""
    with suppress(InvalidStateError):
        settle(value)
