"""Says that jobs wait for a worker: they were taken, as a fleet that is scaled to zero must do."""

import logging
import time
from collections.abc import Iterable

from blipq.ledger.codec import Message

log = logging.getLogger(__name__)

TELL_EVERY_S = 60.0


class Unserved:
    """Warns of a model without a live worker, once a minute for each: of few names, known ones."""

    def __init__(self) -> None:
        self._silent_until: dict[str, float] = {}

    def tell(self, messages: Iterable[Message]) -> None:
        """Looks at what was recorded just now."""
        for model in {message.model for message in messages if not message.served}:
            now = time.monotonic()
            if now >= self._silent_until.get(model, now):
                self._silent_until[model] = now + TELL_EVERY_S
                log.warning("no live worker serves the model %r: its jobs wait for one", model)
