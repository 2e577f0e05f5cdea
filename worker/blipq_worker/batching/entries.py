"""An item on its way through the batcher, and who waits for its answer."""

import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")

#: Stands for an item; of two tickets the smaller is the more urgent one.
Ticket = tuple[int, int]
NEVER = float("inf")


@dataclass(slots=True, eq=False, weakref_slot=True)
class Entry(Generic[Item, Answer]):
    """An item. Entries sort by urgency, then by arrival. Times are of the monotonic clock.

    same: what equal items share, all of which wait for this one; None: it is like no other.
    waiters: their Futures with their deadlines; they stay pending while the item runs, so that they
    can be cancelled until there is an answer, and leave then. placed: it takes one of the places
    for items that wait. waits, started: it is among those that wait; a pass with it has begun.
    """

    ticket: Ticket
    key: Hashable
    item: Item
    arrived: float
    alone: bool
    same: Hashable | None
    waiters: "list[tuple[Future[Answer], float]]" = field(default_factory=list)
    placed: bool = True
    waits: bool = False
    started: bool = False

    @property
    def priority(self) -> int:
        """The smaller the more urgent."""
        return self.ticket[0]

    def add(self, future: "Future[Answer]", deadline: float | None) -> None:
        """One more waits for the answer."""
        ends = NEVER if deadline is None else deadline
        self.waiters.append((future, ends))

    def remove(self, future: "Future[Answer]") -> None:
        """One of them waits no more."""
        self.waiters = [each for each in self.waiters if each[0] is not future]

    def is_due(self, now: float) -> bool:
        """Whether the deadline of one of them has passed."""
        return any(now >= ends for _, ends in self.waiters)

    def expire(self, now: float) -> None:
        """Cancels those whose deadline has passed."""
        for future, ends in self.waiters:
            if now >= ends:
                future.cancel()

    def wanted(self) -> bool:
        """Whether anyone waits for the answer."""
        self.expire(time.monotonic())
        return bool(self.waiters)

    def pending(self) -> "list[Future[Answer]]":
        """The Futures of those that still wait."""
        return [future for future, _ in self.waiters if not future.done()]

    def succeed(self, answer: Answer, shared: Callable[[Answer], Answer]) -> None:
        """The answer, to all. ``shared``: as all but the first of them hear it."""
        for index, (future, _) in enumerate(self.waiters):
            _settle(future.set_result, shared(answer) if index else answer)

    def fail(self, error: Exception) -> None:
        """Why there is no answer, to all."""
        for future, _ in self.waiters:
            _settle(future.set_exception, error)


def _settle(settle: Callable[[Any], None], value: Any) -> None:
    """Sets a Future unless its waiter has given up on it."""
    with suppress(InvalidStateError):
        settle(value)
