"""Runs items together, one Future each. Knows no Celery, torch or BLIP-2.

One thread owns the model. Items of most keys run in batches: the thread takes the most urgent
waiting item, gathers others of the same key, and runs them together; while a batch runs the next
one fills by itself, so the window matters only when the model is idle. Items of other keys join a
``Session`` and leave it one by one: between two steps whoever is done goes and whoever waits comes.

Equal items that are in flight together run once. An item that must run alone waits until what runs
has ended, and lets nobody in before it has ended itself.
"""

import itertools
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Generic

from blipq_worker.batching.entries import NEVER, Answer, Entry, Item, Ticket
from blipq_worker.batching.interface import (
    BatcherClosed,
    BatcherFull,
    Idle,
    Judge,
    Run,
    Running,
    Session,
    Sleep,
    Trusting,
)
from blipq_worker.batching.waiting import Waiting

#: How many times as long as the last batch took the sessions run before a less urgent one.
_LESS_URGENT_WAITS = 4
#: How often expired items are cancelled.
_DEADLINES_S = 0.1


class Batcher(Generic[Item, Answer]):
    """Runs items with ``run`` in batches, and in sessions where their key has one.

    sessions: the keys whose items join and leave, and how to open a session. max_batch_size: most
    items in one batch. batch_wait_timeout_s: longest the first item of a batch waits for others.
    max_waiting: items beyond which ``submit`` blocks. judge: stops it where the fault is not an
    item's. idle: how its thread waits. on_start: is called on that thread with the Futures of items
    before a pass or a step that they newly take part in. shared: an answer as equal items hear it.
    name: what its own thread is called, after "blipq-".

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
        judge: Judge | None = None,
        idle: Idle | None = None,
        on_start: "Callable[[Sequence[Future[Answer]]], None]" = lambda futures: None,
        shared: Callable[[Answer], Answer] = lambda answer: answer,
        name: str = "batcher",
    ) -> None:
        self._run = run
        self._max_batch_size = max_batch_size
        self._window = batch_wait_timeout_s
        self._openers = dict(sessions or {})
        self._judge = judge or Trusting()
        self._idle = idle or Sleep()
        self._on_start = on_start
        self._shared = shared
        self._room = threading.Semaphore(max_waiting)
        # Under the lock, which Futures' callbacks take, too: all that any thread may change.
        self._lock = threading.RLock()
        self._waiting = Waiting()
        self._in_flight: dict[Hashable, Entry[Item, Answer]] = {}  # by what equal ones share
        self._given_up: list[Entry[Item, Answer]] = []  # while they ran
        self._joined_late: list[Future[Answer]] = []  # equal to an item that had started
        self._closed = False
        # Of the thread that runs.
        self._orders = itertools.count()
        self._busy_since: float | None = None
        self._sessions: dict[Hashable, Running[Item, Answer]] = {}
        self._alone: Entry[Item, Answer] | None = None
        self._alone_was_last = False  # before any others joined or ran
        self._in_batch = 0
        self._batch_took = 0.0
        self._batch_ended = 0.0
        self._deadlines_due = 0.0
        self._runs_on: int | None = None
        self._thread = threading.Thread(target=self.run, name=f"blipq-{name}", daemon=True)

    def start(self) -> None:
        """Starts a thread that owns the model."""
        self._thread.start()

    def submit(
        self,
        item: Item,
        key: Hashable,
        *,
        priority: int = 0,
        timeout: float | None = None,
        deadline: float | None = None,
        alone: bool = False,
        same: Hashable | None = None,
    ) -> "Future[Answer]":
        """Adds an item; smaller ``priority`` first. Raises BatcherFull and BatcherClosed.

        A Future that is cancelled before its item runs costs nothing; later the item stops at the
        next step. At the ``deadline`` (monotonic) it is cancelled by itself. alone: nothing runs
        beside it. same: items of one key and one ``same`` have one answer, whichever of them runs.
        """
        future: Future[Answer] = Future()
        equal = None if alone or same is None else (key, same)
        with self._lock:
            if not self._closed and self._follows(equal, priority, future, deadline):
                return future
        if not self._room.acquire(timeout=timeout):
            raise BatcherFull(f"no room for {timeout} s")
        with self._lock:
            if self._closed:
                self._room.release()
                raise BatcherClosed
            if self._follows(equal, priority, future, deadline):  # one that came meanwhile
                self._room.release()
                return future
            ticket = priority, next(self._orders)
            entry: Entry[Item, Answer] = Entry(ticket, key, item, time.monotonic(), alone, equal)
            self._wait_for(entry, future, deadline)
            self._waiting.add(entry)
            if equal is not None:
                self._in_flight[equal] = entry
        self._idle.wake()
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
            if threading.get_ident() == self._runs_on:
                self._attend(0.0)

    def close(self, timeout: float | None = None) -> None:
        """Runs what waits, then stops. Items that come later are refused."""
        with self._lock:
            self._closed = True
        self._idle.wake()
        if self._thread.is_alive():
            self._thread.join(timeout)

    # -- who waits; with the lock held --

    def _follows(
        self,
        equal: Hashable | None,
        priority: int,
        future: "Future[Answer]",
        deadline: float | None,
    ) -> bool:
        """Has a Future wait for an equal item, if one is in flight, which becomes as urgent."""
        entry = None if equal is None else self._in_flight.get(equal)
        if entry is None:
            return False
        self._wait_for(entry, future, deadline)
        if entry.started:
            self._joined_late.append(future)
        elif entry.waits and priority < entry.priority:
            self._waiting.remove(entry)
            entry.ticket = priority, entry.ticket[1]
            self._waiting.add(entry)
        return True

    def _wait_for(
        self, entry: Entry[Item, Answer], future: "Future[Answer]", deadline: float | None
    ) -> None:
        entry.add(future, deadline)
        # Weakly: whoever keeps the Future shall not keep the item with its image.
        future.add_done_callback(partial(self._gives_up, weakref.ref(entry)))

    def _gives_up(
        self, found: "weakref.ref[Entry[Item, Answer]]", future: "Future[Answer]"
    ) -> None:
        """A Future is done. If it was the last to be cancelled, its item leaves."""
        if not future.cancelled() or (entry := found()) is None:
            return
        with self._lock:
            entry.remove(future)
            if entry.waiters:
                return
            self._forget(entry)  # at once: the model may give up what it makes from now on
            if entry.waits:
                self._take(entry)
            else:
                self._given_up.append(entry)

    def _forget(self, entry: Entry[Item, Answer]) -> None:
        """No item becomes equal to it any more."""
        if entry.same is not None and self._in_flight.get(entry.same) is entry:
            del self._in_flight[entry.same]

    def _take(self, entry: Entry[Item, Answer]) -> None:
        """Takes an entry out of those that wait."""
        self._waiting.remove(entry)
        if entry.placed:
            self._room.release()
        entry.placed = False

    # -- the thread that runs --

    def run(self) -> None:
        """Owns the model until it is closed, on the caller's thread.

        Turn by turn: items leave and join, a batch runs if it is its turn, sessions step.
        """
        self._runs_on = threading.get_ident()
        trusted = True
        while trusted and self._wait():
            self._busy_since = time.monotonic()
            self._turn()
            if self._judge.doubts():
                trusted = self._is_trusted()
            if not self._sessions:
                self._busy_since = None

    def _attend(self, timeout_s: float | None) -> None:
        """Waits, and lets others in; then ends what is due, and names those that came too late."""
        self._idle.wait(timeout_s)
        now = time.monotonic()
        if now >= self._deadlines_due:
            self._deadlines_due = now + _DEADLINES_S
            self._expire(now)
        if self._joined_late:
            late, self._joined_late = self._joined_late, []
            self._on_start([future for future in late if not future.done()])

    def _expire(self, now: float) -> None:
        """Cancels items whose deadline has passed."""
        with self._lock:
            waiting = [entry for entry in self._waiting if entry.is_due(now)]
        running = [entry for each in self._sessions.values() for entry in each.due(now)]
        for entry in waiting + running:
            entry.expire(now)

    def _turn(self) -> None:
        self._let_go()
        if self._is_for_one():
            joined, batch = self._next_alone()
            self._alone_was_last = self._alone_was_last or bool(joined or batch)
        else:
            joined, batch = self._admit(), self._next_batch()
            self._alone_was_last = self._alone_was_last and not (joined or batch)
        if batch:
            self._answer_batch(batch)
        self._begin(joined)  # after the batch: had that ended the process, these were not in it
        for key, running in self._sessions.items():
            if running.entries:
                self._step(key, running, list(running.entries))
        self._sessions = {key: each for key, each in self._sessions.items() if each.entries}
        if not self._sessions:
            self._alone = None

    def _is_trusted(self) -> bool:
        """Has the model checked, alone: what was in sessions waits, and begins again after that."""
        for running in self._sessions.values():
            for ticket in running.entries:
                running.session.leave(ticket)
            self._put_back(list(running.entries.values()))
        self._sessions, self._alone = {}, None
        return self._judge.trusts()

    def _put_back(self, entries: list[Entry[Item, Answer]]) -> None:
        with self._lock:
            for entry in entries:
                if entry.waiters:
                    self._waiting.add(entry)

    def _wait(self) -> bool:
        """Waits until there is something to do; False when closed and empty."""
        while not self._sessions:
            with self._lock:
                idle_s = self._idle_for()
                if idle_s <= 0:
                    break
                if self._closed and not self._waiting:
                    return False
            self._attend(None if idle_s == NEVER else idle_s)
        return True

    def _idle_for(self) -> float:
        """Seconds until a waiting item must run, where no session does."""
        waiting = self._waiting
        if waiting.alone is not None or waiting.first_of(self._openers) is not None:
            return 0.0
        first = waiting.first_but(self._openers)
        return NEVER if first is None else self._due_in(first)

    def _due_in(self, first: Entry[Item, Answer]) -> float:
        """Seconds for which the batch of an item may still wait for others."""
        if self._closed or self._is_full(first.key):
            return 0.0
        return max(0.0, first.arrived + self._window - time.monotonic())

    def _begin(self, entries: Sequence[Entry[Item, Answer]]) -> None:
        """Says who newly takes part in what runs next."""
        if not entries:
            return
        with self._lock:
            new = [entry for entry in entries if not entry.started]
            for entry in new:
                entry.started = True
            futures = [future for entry in new for future in entry.pending()]
        if futures:
            self._on_start(futures)

    # -- sessions --

    def _let_go(self) -> None:
        """Items that nobody waits for leave."""
        with self._lock:
            gone, self._given_up = self._given_up, []
        for entry in gone:
            running = self._sessions.get(entry.key)
            if running is not None and running.entries.get(entry.ticket) is entry:
                del running.entries[entry.ticket]
                running.session.leave(entry.ticket)

    def _admit(self) -> list[Entry[Item, Answer]]:
        """Lets items into their sessions while there is room, the most urgent first; who joined."""
        joined = []
        while not self._judge.doubts() and (entry := self._next_to_join()) is not None:
            if self._join(entry):
                joined.append(entry)
        return joined

    def _next_to_join(self) -> Entry[Item, Answer] | None:
        with self._lock:
            for key in self._openers:
                entry = self._waiting.first_of((key,))
                if entry is not None and self._may_join(entry):
                    self._take(entry)
                    return entry
        return None

    def _may_join(self, entry: Entry[Item, Answer]) -> bool:
        running = self._sessions.get(entry.key)
        return running is None or running.session.has_room(entry.ticket)

    def _join(self, entry: Entry[Item, Answer]) -> bool:
        """Whether an entry is in its session now."""
        if not entry.wanted():
            return False
        running = self._sessions.get(entry.key)
        try:
            if running is None:
                running = self._sessions[entry.key] = Running(self._openers[entry.key]())
            running.session.join(entry.ticket, entry.item)
        except Exception as error:
            self._judge.failed(entry.key, entry.item, error)
            self._fail(entry, error)
            return False
        running.entries[entry.ticket] = entry
        return True

    def _step(self, key: Hashable, running: Running[Item, Answer], tickets: list[Ticket]) -> None:
        if self._judge.doubts():
            return
        try:
            answers = running.session.step(tickets)
        except Exception as error:
            alone = running.entries[tickets[0]].item if len(tickets) == 1 else None
            self._judge.failed(key, alone, error)
            if len(tickets) == 1:
                running.session.leave(tickets[0])
                self._fail(running.entries.pop(tickets[0]), error)
                return
        else:
            if answers:
                self._judge.answered(key)
            for ticket, answer in answers:
                self._succeed(running.entries.pop(ticket), answer)
            self.progress()
            return
        # Not in the handler: there the error would keep the memory that halves may need.
        self.progress()
        middle = len(tickets) // 2
        self._step(key, running, tickets[:middle])
        self._step(key, running, tickets[middle:])

    # -- items that run alone --

    def _is_for_one(self) -> bool:
        """Whether this turn is for items that run alone: between two of them others have one."""
        if self._alone is not None:
            return True
        with self._lock:
            others_wait = len(self._waiting) > self._waiting.count_alone
            return self._waiting.alone is not None and not (self._alone_was_last and others_wait)

    def _next_alone(self) -> tuple[list[Entry[Item, Answer]], list[Entry[Item, Answer]]]:
        """Once nothing else runs, the next item that must run alone: has joined, or is a batch.

        Until then nobody joins, however urgent: what runs ends sooner so.
        """
        if self._judge.doubts() or any(each.entries for each in self._sessions.values()):
            return [], []
        with self._lock:
            entry = self._waiting.alone
            if entry is None:
                return [], []
            self._take(entry)
        if entry.key not in self._openers:
            return [], [entry] if entry.wanted() else []
        if self._join(entry):
            self._alone = entry
        return [entry] if self._alone is entry else [], []

    # -- batches --

    def _next_batch(self) -> list[Entry[Item, Answer]]:
        """The batch whose turn it is; empty if there is none."""
        with self._lock:
            first = self._waiting.first_but(self._openers)
            if first is None or self._due_in(first) > 0 or not self._has_turn(first):
                return []
            batch = self._company(first.key)
            for entry in batch:
                self._take(entry)
        return [entry for entry in batch if entry.wanted()]

    def _has_turn(self, first: Entry[Item, Answer]) -> bool:
        """Whether a batch may interrupt the sessions.

        A more urgent one may at once, an equal one when they ran as long as the last batch.
        """
        tickets = [ticket for running in self._sessions.values() for ticket in running.entries]
        if not tickets:
            return True
        outside = self._waiting.first_of(self._openers)
        most_urgent = min(tickets)[0] if outside is None else min(*tickets, outside.ticket)[0]
        if first.priority < most_urgent:
            return True
        share = 1 if first.priority == most_urgent else _LESS_URGENT_WAITS
        return time.monotonic() - self._batch_ended >= share * self._batch_took

    def _company(self, key: Hashable) -> list[Entry[Item, Answer]]:
        """The most urgent entries of a key, as many as fit into a batch."""
        return self._waiting.batch(key, self._max_batch_size)

    def _is_full(self, key: Hashable) -> bool:
        return len(self._waiting.of(key)) >= self._max_batch_size

    def _answer_batch(self, batch: list[Entry[Item, Answer]]) -> None:
        started, self._in_batch = time.monotonic(), len(batch)
        self._answer(batch)
        self._in_batch = 0
        self._batch_ended = time.monotonic()
        self._batch_took = self._batch_ended - started

    def _answer(self, batch: list[Entry[Item, Answer]]) -> None:
        if self._judge.doubts():
            self._put_back(batch)
            return
        self._begin(batch)
        items = [entry.item for entry in batch]
        try:
            answers = self._run(batch[0].key, items, lambda index: batch[index].wanted())
            if len(answers) != len(batch):
                raise RuntimeError(f"{len(answers)} answers for {len(batch)} items")
        except Exception as error:
            self._judge.failed(batch[0].key, items[0] if len(batch) == 1 else None, error)
            if len(batch) == 1:
                self._fail(batch[0], error)
                return
        else:
            self._judge.answered(batch[0].key)
            for entry, answer in zip(batch, answers, strict=True):
                self._succeed(entry, answer)
            self.progress()
            return
        self.progress()
        middle = len(batch) // 2
        self._answer(batch[:middle])
        self._answer(batch[middle:])

    # -- outcomes --

    def _succeed(self, entry: Entry[Item, Answer], answer: Answer) -> None:
        self._end(entry)
        entry.succeed(answer, self._shared)

    def _fail(self, entry: Entry[Item, Answer], error: Exception) -> None:
        self._end(entry)
        entry.fail(error)

    def _end(self, entry: Entry[Item, Answer]) -> None:
        """Nobody joins its waiters from now on."""
        with self._lock:
            self._forget(entry)
