"""Who may run now: everyone together, one job alone, or nobody any more."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Draining(Exception):
    """The worker is stopping: it takes no more jobs."""


class Gate:
    """A readers-writer lock with a closed state.

    A job that may have killed its worker runs alone (``solo``): new jobs wait before they claim,
    those that run finish first. It therefore spends no neighbour's attempts.
    """

    def __init__(self) -> None:
        # All are woken by each change: who waits to be alone and who waits for the others.
        self._changed = threading.Condition()
        self._inside = 0
        self._solo = False
        self._closed = False

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Inside together with others. Raises Draining."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not self._solo)
            self._raise_if_closed()
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Alone inside: waits until the others have left. Raises Draining."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not self._solo)
            self._raise_if_closed()
            self._solo = True  # before the wait: no other job enters while those inside finish
            self._changed.wait_for(lambda: self._inside == 0)
        try:
            yield
        finally:
            with self._changed:
                self._solo = False
                self._changed.notify_all()

    def close(self) -> None:
        """Nobody enters any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @property
    def closed(self) -> bool:
        """Whether the worker is stopping."""
        return self._closed

    @property
    def open(self) -> bool:
        """Whether a job that comes now may enter at once."""
        return not self._closed and not self._solo

    def _raise_if_closed(self) -> None:
        if self._closed:
            raise Draining
