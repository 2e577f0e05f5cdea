"""Threads that do one thing every few seconds."""

import logging
import threading
from abc import ABC, abstractmethod

from blipq.errors import BlipqError

log = logging.getLogger(__name__)


class Periodic(ABC):
    """A daemon thread that does one thing every ``interval_s``, and outlives Redis' outages."""

    def __init__(self, name: str, interval_s: float) -> None:
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Stops the thread after what it does now."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    @abstractmethod
    def tick(self) -> None:
        """The one thing."""

    def _loop(self) -> None:
        while not self._stop.wait(self._interval_s):
            try:
                self.tick()
            except BlipqError as error:
                log.warning("%s: %s", self._thread.name, error)
            except Exception:
                log.exception("%s", self._thread.name)
