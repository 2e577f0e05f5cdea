"""Where a worker's start spends its time: a line for each part, and a sum when it is ready."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)


class Start:
    """Seconds by part, counted from when it is made."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._took: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Logs how long a part took. Those of one name add up; none may be inside another."""
        began = self._clock()
        yield
        took = self._clock() - began
        self._took[name] = self._took.get(name, 0.0) + took
        log.info("start: %s took %.1f s", name, took)

    def __str__(self) -> str:
        total = self._clock() - self._began
        parts = {**self._took, "other": total - sum(self._took.values())}
        shown = ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items())
        return f"{total:.1f} s: {shown}"


#: This process's start, from the first import of blipq_worker on.
START = Start()
