"""Warns that jobs wait for a worker: they were accepted, as for a fleet that is scaled to zero."""

import logging
import time
from collections.abc import Iterable

from blipq.ledger.codec import Message

log = logging.getLogger(__name__)

WARN_EVERY_S = 60.0


class Unserved:
    """Warns of a model without a live worker, once a minute for each: of few names, known ones."""

    def __init__(self) -> None:
        self._silent_until: dict[str, float] = {}

    def warn(self, messages: Iterable[Message]) -> None:
        """Checks the messages that were recorded just now."""
        for model in {message.model for message in messages if not message.served}:
            now = time.monotonic()
            if now >= self._silent_until.get(model, now):
                self._silent_until[model] = now + WARN_EVERY_S
                log.warning("no live worker serves the model %r: its jobs wait for one", model)
