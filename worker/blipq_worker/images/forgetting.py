"""Drops what is known of images whose jobs were erased: here, and in the engine."""

from contextlib import suppress

from blipq.ledger.worker import WorkerLedger
from blipq_worker.images.loader import Pictures
from blipq_worker.inference.interface import EngineGone, Inference
from blipq_worker.process.periodic import Periodic

BEAT_S = 5.0


class Forgetting(Periodic):
    """Reads every few seconds what was erased. Of each process that loads images."""

    def __init__(self, ledger: WorkerLedger, pictures: Pictures, inference: Inference) -> None:
        super().__init__("blipq-forgetting", BEAT_S)
        self._ledger = ledger
        self._pictures = pictures
        self._inference = inference
        self._since = 0.0

    def tick(self) -> None:
        """What has been erased since the last time."""
        now, marks = self._ledger.forgotten(self._since)
        digests = self._pictures.forget(marks)
        if digests:
            with suppress(EngineGone):  # and with it all that it knew
                self._inference.forget(digests)
        self._since = now
