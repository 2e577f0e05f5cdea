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
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def hurry(self) -> None:
        """Has the thread do it now instead of after the rest of its pause."""
        self._wake.set()

    def stop(self) -> None:
        """Stops the thread after what it does now."""
        self._stop.set()
        self._wake.set()  # after the other: the thread looks at it when it wakes
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    @abstractmethod
    def tick(self) -> None:
        """The one thing."""

    def turn(self) -> None:
        """Does it once; logs what goes wrong."""
        try:
            self.tick()
        except BlipqError as error:
            log.warning("%s: %s", self._thread.name, error)
        except Exception:
            log.exception("%s", self._thread.name)

    def _loop(self) -> None:
        while True:
            self._wake.wait(self._interval_s)
            self._wake.clear()
            if self._stop.is_set():
                return
            self.turn()
