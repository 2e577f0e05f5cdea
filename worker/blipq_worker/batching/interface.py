"""What a batcher is given: what runs its items, how its thread waits, and what judges both."""

import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from blipq_worker.batching.entries import Answer, Entry, Item, Ticket

ItemIn = TypeVar("ItemIn", contravariant=True)
AnswerOut = TypeVar("AnswerOut", covariant=True)


class BatcherFull(Exception):
    """No room among the waiting items within the timeout."""


class BatcherClosed(Exception):
    """The batcher takes no more items."""


class Session(Protocol[ItemIn, AnswerOut]):
    """Items that run together and need neither start nor end together. Of one thread."""

    def has_room(self, ticket: Ticket) -> bool:
        """Whether an item of this urgency would be at work soon; if not, no less urgent one is."""

    def join(self, ticket: Ticket, item: ItemIn) -> None:
        """Takes an item in. If it raises, the item fails."""

    def leave(self, ticket: Ticket) -> None:
        """Lets an item go, whatever it has come to. Does not raise."""

    def step(self, tickets: Sequence[Ticket]) -> Sequence[tuple[Ticket, AnswerOut]]:
        """Takes these items one step further; the answers of those that are done and have left.

        If it raises, the batcher tries halves of them until the item that raises is alone: a step
        that raised must be one that can be taken again.
        """


@dataclass(slots=True)
class Running(Generic[Item, Answer]):
    """A session and the items in it."""

    session: Session[Item, Answer]
    entries: dict[Ticket, Entry[Item, Answer]] = field(default_factory=dict)

    def due(self, now: float) -> list[Entry[Item, Answer]]:
        """Items with a deadline that has passed (monotonic)."""
        return [entry for entry in self.entries.values() if entry.is_due(now)]


class Run(Protocol[ItemIn, AnswerOut]):
    def __call__(
        self, key: Hashable, items: Sequence[ItemIn], wanted: Callable[[int], bool]
    ) -> Sequence[AnswerOut]:
        """One answer per item, in order. ``wanted(i)`` is whether anyone waits for item ``i``."""


class Judge(Protocol):
    """Receives the outcomes of items, on the batcher's thread, and decides whether to go on."""

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


class Idle(Protocol):
    """How the batcher's thread waits, and what it does between two steps."""

    def wait(self, timeout_s: float | None) -> None:
        """Waits for ``wake``, but at most so long; it may return at any time before that.

        On the batcher's thread: with 0 after each step, to let others in while the model works.
        """

    def wake(self) -> None:
        """Ends a wait: the present one, or the next. Thread-safe."""


class Sleep:
    """Waits, and does nothing else."""

    def __init__(self) -> None:
        self._woken = threading.Event()

    def wait(self, timeout_s: float | None) -> None:
        """Until ``wake``."""
        self._woken.wait(timeout_s)
        # A wake just before this is not lost: the thread looks for work after each wait.
        self._woken.clear()

    def wake(self) -> None:
        """Ends a wait."""
        self._woken.set()
