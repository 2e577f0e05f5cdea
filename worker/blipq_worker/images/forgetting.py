"""Drops what the process knows of images whose jobs were erased."""

from collections.abc import Callable

from blipq.ledger.worker import WorkerLedger
from blipq_worker.images.loader import Pictures
from blipq_worker.process.periodic import Periodic

BEAT_S = 5.0


class Forgetting(Periodic):
    """Reads every few seconds what was erased. ``drop``: has models forget an image, by SHA-256."""

    def __init__(
        self, ledger: WorkerLedger, pictures: Pictures, drop: Callable[[str], object]
    ) -> None:
        super().__init__("blipq-forgetting", BEAT_S)
        self._ledger = ledger
        self._pictures = pictures
        self._drop = drop
        self._since = 0.0

    def tick(self) -> None:
        """What has been erased since the last time."""
        now, marks = self._ledger.forgotten(self._since)
        for digest in self._pictures.forget(marks):
            self._drop(digest)
        self._since = now
