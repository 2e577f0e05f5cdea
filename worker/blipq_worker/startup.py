"""Where a worker's start spends its time, until its first job has ended: a line for each part."""

import logging
import threading
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
        self._ready: float | None = None
        self._first = threading.Lock()  # never released: whoever takes it has the first job

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Logs how long a part took. Those of one name add up; none may be inside another."""
        began = self._clock()
        yield
        took = self._clock() - began
        self._took[name] = self._took.get(name, 0.0) + took
        log.info("start: %s took %.1f s", name, took)

    def ready(self) -> None:
        """Logs the parts: from now on jobs are taken."""
        log.info("ready after %s", str(self))  # once, however many handlers there are
        self._ready = self._clock()

    def job_succeeded(self, took_s: float) -> None:
        """Logs, for the first job alone, how long it was until its result. Thread-safe."""
        if self._ready is None or not self._first.acquire(blocking=False):
            return
        now = self._clock()
        waited = max(0.0, now - took_s - self._ready)
        log.info(
            "first result %.1f s after the start: ready %.1f, waited for a job %.1f, ran it %.1f",
            now - self._began,
            self._ready - self._began,
            waited,
            took_s,
        )

    def __str__(self) -> str:
        total = self._clock() - self._began
        parts = {**self._took, "other": total - sum(self._took.values())}
        shown = ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items())
        return f"{total:.1f} s: {shown}"


#: This process's start, from the first import of blipq_worker on.
START = Start()
