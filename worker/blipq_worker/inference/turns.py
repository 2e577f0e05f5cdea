"""Whose turn it is: epoll reports who has something, but not all that must be served."""

import select
import socket

#: How soon a front is read again that waits for room for pixels.
_STARVED_S = 0.005


class Turns:
    """Descriptors in the order in which they are served. Of one thread."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        # Dicts, as they keep an order. First those for which time did not suffice, so that nobody
        # is always the last; then those that may have more; then those that wait for room.
        self._skipped: dict[int, None] = {}
        self._again: dict[int, None] = {}
        self._starved: dict[int, None] = {}

    def ready(self, timeout_s: float) -> dict[int, int]:
        """Events by descriptor, after a wait of at most ``timeout_s`` in whole milliseconds."""
        left = [*self._skipped, *self._again, *self._starved]
        wait_s = 0.0 if self._skipped or self._again else timeout_s
        ms = int(min(wait_s, _STARVED_S if self._starved else wait_s) * 1000)
        # epoll rounds up to whole milliseconds: half of one less than these gives exactly these.
        ready = self._epoll.poll((ms - 0.5) / 1000 if ms else 0)
        self._skipped, self._again, self._starved = {}, {}, {}
        events = dict.fromkeys(left, select.EPOLLIN)
        for fd, event in ready:
            events[fd] = events.get(fd, 0) | event
        return events

    def skip(self, fd: int) -> None:
        """It had no turn: it is the first of the next."""
        self._skipped[fd] = None

    def again(self, fd: int) -> None:
        """It may have more than it had time for, where epoll does not see it."""
        self._again[fd] = None

    def starve(self, fd: int) -> None:
        """It waits for room for pixels: it is read again soon."""
        self._starved[fd] = None

    def waits(self, fd: int) -> bool:
        """Whether it waits for the engine, and not the engine for it."""
        return fd in self._skipped or fd in self._again or fd in self._starved

    def watch(self, source: "socket.socket | int", events: int = select.EPOLLIN) -> None:
        """Has epoll report a descriptor from now on."""
        self._epoll.register(source, events)

    def change(self, source: socket.socket, events: int) -> None:
        """Has epoll report other events."""
        self._epoll.modify(source, events)

    def forget(self, source: socket.socket) -> None:
        """It is served no more."""
        self._epoll.unregister(source)
        for fds in (self._skipped, self._again, self._starved):
            fds.pop(source.fileno(), None)

    def close(self) -> None:
        """Frees the descriptor."""
        self._epoll.close()
