"""Bytes that may be in memory at once, whatever arrives at the same time."""

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from blipq.contract import ErrorCode
from blipq.errors import TransientError


class Share:
    """What one holder was granted of a budget."""

    def __init__(self, budget: "Budget", amount: int) -> None:
        self._budget = budget
        self.amount = amount
        self.since = time.monotonic()

    def shrink(self, amount: int) -> None:
        """Gives back what turned out not to be needed."""
        self._budget._shrink(self, amount)


class Budget:
    """At most ``total`` bytes in at most ``most`` shares, granted in the order of their requests.

    What is larger than the whole budget is granted when nobody else holds any: it runs alone. use:
    what the bytes are for, and which setting bounds them, for errors.
    """

    def __init__(self, total: int, *, most: int, use: str = "of memory") -> None:
        self._use = use
        self._total = total
        self._most = most
        self._held: set[Share] = set()
        self._waiting: deque[object] = deque()
        # Whoever leaves or is granted a share wakes all: only the first of the line may go on.
        self._changed = threading.Condition()

    @contextmanager
    def reserve(self, amount: int, *, timeout: float) -> Iterator[Share]:
        """Holds ``amount`` bytes.

        Raises TransientError if they are not free within ``timeout`` seconds.
        """
        share = self._grant(min(amount, self._total), timeout)
        try:
            yield share
        finally:
            with self._changed:
                self._held.remove(share)
                self._changed.notify_all()

    def held_for(self) -> float:
        """Seconds since the oldest share that is held was granted; 0 when none is."""
        with self._changed:
            oldest = min((share.since for share in self._held), default=None)
        return 0.0 if oldest is None else time.monotonic() - oldest

    @property
    def waiting(self) -> int:
        """How many wait for a share now."""
        return len(self._waiting)

    def _grant(self, amount: int, timeout: float) -> Share:
        place = object()
        with self._changed:
            self._waiting.append(place)
            try:
                if not self._changed.wait_for(lambda: self._is_next(place, amount), timeout):
                    message = f"{amount:,} bytes {self._use} were not free within {timeout:g} s"
                    raise TransientError(ErrorCode.INTERNAL, message)
                share = Share(self, amount)
                self._held.add(share)
                return share
            finally:
                self._waiting.remove(place)
                self._changed.notify_all()

    def _is_next(self, place: object, amount: int) -> bool:
        taken = sum(share.amount for share in self._held)
        free = len(self._held) < self._most and taken + amount <= self._total
        return free and self._waiting[0] is place

    def _shrink(self, share: Share, amount: int) -> None:
        with self._changed:
            share.amount = min(share.amount, amount)
            self._changed.notify_all()
