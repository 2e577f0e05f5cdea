"""Whether decoding is what bounds a worker: images wait for it, and the model for images."""

from collections import deque
from collections.abc import Callable
from typing import Protocol

#: What is known comes from so many looks, and from that share of them.
LOOKS, SHARE = 15, 0.8


class Work(Protocol):
    """What an engine has to do: items that wait, and items that run."""

    @property
    def waiting(self) -> int: ...
    @property
    def running(self) -> int: ...


class Bottleneck:
    """Looks at both sides from time to time.

    waiting: images that wait to be decoded. work: the engine's; None without an engine. slots:
    items that the engine would run at once.
    """

    def __init__(
        self, waiting: Callable[[], int], work: Callable[[], Work | None], slots: int
    ) -> None:
        self._waiting, self._work, self._slots = waiting, work, slots
        self._found: deque[bool] = deque(maxlen=LOOKS)

    def look(self) -> None:
        """One look; at every beat."""
        self._found.append(self._waiting() > 0 and self._engine_has_room())

    @property
    def holds(self) -> bool:
        """Whether decoding was the bound in nearly all of the last looks."""
        return len(self._found) == LOOKS and sum(self._found) >= SHARE * LOOKS

    def _engine_has_room(self) -> bool:
        work = self._work()
        return work is not None and work.waiting == 0 and work.running < self._slots
