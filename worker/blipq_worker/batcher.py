"""Groups items into batches, one Future each. Knows no Celery, torch or BLIP-2.

One thread owns the model: it takes the most urgent waiting item, gathers others of the same batch
key, and runs them together. While a batch runs the next one fills by itself, so the window matters
only when the model is idle.
"""

import heapq
import itertools
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class BatcherFull(Exception):
    """No room among the waiting items within the timeout."""


class BatcherClosed(Exception):
    """The batcher takes no more items."""


@dataclass(order=True, slots=True)
class _Entry(Generic[Item, Answer]):
    """A waiting item; entries sort by urgency, then by arrival."""

    priority: int
    order: int
    key: Hashable = field(compare=False)
    item: Item = field(compare=False)
    arrived: float = field(compare=False)
    future: "Future[Answer]" = field(compare=False)


class Batcher(Generic[Item, Answer]):
    """Runs ``run(key, items)`` on batches of items that share a key.

    max_batch_size: most items in one batch. batch_wait_timeout_s: longest the first item of a batch
    waits for company. max_waiting: items beyond which ``submit`` blocks.

    A batch that raises is halved and run again until the item that raises is alone: it gets the
    exception, the others their answers. ``run`` must return one answer per item, in order.
    """

    def __init__(
        self,
        run: Callable[[Hashable, Sequence[Item]], Sequence[Answer]],
        *,
        max_batch_size: int,
        batch_wait_timeout_s: float = 0.0,
        max_waiting: int = 64,
    ) -> None:
        self._run = run
        self._max_batch_size = max_batch_size
        self._window = batch_wait_timeout_s
        self._room = threading.Semaphore(max_waiting)
        self._waiting: list[_Entry[Item, Answer]] = []
        self._changed = threading.Condition()
        self._orders = itertools.count()
        self._closed = False
        self._busy_since: float | None = None
        self._thread = threading.Thread(target=self._loop, name="blipq-batcher", daemon=True)

    def start(self) -> None:
        """Starts the thread that owns the model."""
        self._thread.start()

    def submit(
        self, item: Item, key: Hashable, *, priority: int = 0, timeout: float | None = None
    ) -> "Future[Answer]":
        """Adds an item; smaller ``priority`` first. Raises BatcherFull and BatcherClosed.

        A Future that is cancelled before its batch forms costs nothing.
        """
        if not self._room.acquire(timeout=timeout):
            raise BatcherFull(f"no room for {timeout} s")
        future: Future[Answer] = Future()
        entry = _Entry(priority, next(self._orders), key, item, time.monotonic(), future)
        with self._changed:
            if self._closed:
                self._room.release()
                raise BatcherClosed
            heapq.heappush(self._waiting, entry)
            self._changed.notify()
        return future

    def stalled_for(self) -> float:
        """Seconds since the running batch last made progress; 0 when nothing runs."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def progress(self) -> None:
        """Says that the running batch is alive: a decode step or a pass is done."""
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
        while (batch := self._next_batch()) is not None:
            live = [entry for entry in batch if entry.future.set_running_or_notify_cancel()]
            if live:
                self._busy_since = time.monotonic()
                self._answer(live)
                self._busy_since = None

    def _next_batch(self) -> list[_Entry[Item, Answer]] | None:
        """Waits for a batch; None when closed and empty."""
        with self._changed:
            while not self._waiting:
                if self._closed:
                    return None
                self._changed.wait()
            first = self._waiting[0]
            until = first.arrived + self._window
            while self._company(first.key) < self._max_batch_size and not self._closed:
                left = until - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    break
            return self._take(self._waiting[0].key)

    def _company(self, key: Hashable) -> int:
        return sum(entry.key == key for entry in self._waiting)

    def _take(self, key: Hashable) -> list[_Entry[Item, Answer]]:
        """The most urgent entries of a key, at most a batch of them."""
        same = sorted(entry for entry in self._waiting if entry.key == key)
        batch = same[: self._max_batch_size]
        taken = {entry.order for entry in batch}
        self._waiting = [entry for entry in self._waiting if entry.order not in taken]
        heapq.heapify(self._waiting)
        self._room.release(len(batch))
        return batch

    def _answer(self, batch: list[_Entry[Item, Answer]]) -> None:
        try:
            answers = self._run(batch[0].key, [entry.item for entry in batch])
            if len(answers) != len(batch):
                raise RuntimeError(f"{len(answers)} answers for {len(batch)} items")
        except Exception as error:
            self._halve(batch, error)
            return
        self.progress()
        for entry, answer in zip(batch, answers, strict=True):
            _settle(entry.future.set_result, answer)

    def _halve(self, batch: list[_Entry[Item, Answer]], error: Exception) -> None:
        self.progress()
        if len(batch) == 1:
            _settle(batch[0].future.set_exception, error)
            return
        middle = len(batch) // 2
        self._answer(batch[:middle])
        self._answer(batch[middle:])


def _settle(settle: Callable[[Any], None], value: Any) -> None:
    """Sets a Future unless its waiter has given up on it."""
    with suppress(InvalidStateError):
        settle(value)
