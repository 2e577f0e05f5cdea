"""Which cells answer, and which models they know. Pure: what calls have shown, for a while."""

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass

from blipq.backoff import Backoff
from blipq.errors import QueueUnavailable

#: A cell that is away is left alone for so long, before one call tries it again.
AWAY = Backoff(0.5, 5.0)
#: A cell that answered so lately needs no other sign that it can be reached.
FRESH_S = 0.05
#: How long it is remembered whether a cell knows a model, and of how many models.
KNOWN_S, UNKNOWN_S, MOST_MODELS = 60.0, 5.0, 1000


@dataclass(slots=True)
class _State:
    answered_at: float = -FRESH_S
    failures: int = 0
    away_until: float = 0.0
    why: QueueUnavailable | None = None


class Health:
    """What is known of cells. Threads share it."""

    def __init__(self, cells: tuple[str, ...]) -> None:
        self._states = {cell: _State() for cell in cells}
        self._models: dict[tuple[str, str], tuple[bool, float]] = {}
        # The count of failures and the pause that follows from it change together.
        self._lock = threading.Lock()

    def answered(self, cell: str) -> None:
        """A cell answered a call."""
        state = self._states[cell]
        state.answered_at = time.monotonic()  # without the lock: after each call, and one write
        if state.failures:
            with self._lock:
                state.failures, state.away_until, state.why = 0, 0.0, None

    def failed(self, cell: str, why: QueueUnavailable) -> None:
        """A cell did not answer."""
        with self._lock:
            state = self._states[cell]
            state.away_until = time.monotonic() + AWAY.pause_s(state.failures)
            state.failures += 1
            state.answered_at, state.why = -FRESH_S, why

    def is_fresh(self, cell: str) -> bool:
        """Whether a cell answered just now."""
        return time.monotonic() - self._states[cell].answered_at < FRESH_S

    def is_ready(self, cell: str, model: str) -> bool:
        """Whether a job for a model can be sent to a cell without a look at either before."""
        return self.is_fresh(cell) and self.knows(cell, model) is True

    def has_failed(self, cell: str) -> bool:
        """Whether the last call of a cell had no answer."""
        return self._states[cell].why is not None

    def failed_last(self, cells: Iterable[str]) -> list[str]:
        """Cells in the same order, but those whose last call had no answer behind the others."""
        return sorted(cells, key=self.has_failed)

    def away(self, cell: str) -> QueueUnavailable | None:
        """Why not to wait for a cell now; None where it is worth a try.

        When a pause is over, one caller tries the cell, and the others leave it alone meanwhile.
        """
        state = self._states[cell]
        if state.why is None:
            return None
        with self._lock:
            now = time.monotonic()
            if state.why is None or now < state.away_until:
                return state.why
            state.away_until = now + AWAY.pause_s(state.failures)
            return None

    def knows(self, cell: str, model: str) -> bool | None:
        """Whether a cell knows a model; None where that is not known lately."""
        found, until = self._models.get((cell, model), (None, 0.0))
        return found if time.monotonic() < until else None

    def learn(self, cell: str, model: str, known: bool) -> None:
        """Records a cell's reply whether it knows a model."""
        if len(self._models) >= MOST_MODELS:
            self._models.clear()
        self._models[cell, model] = known, time.monotonic() + (KNOWN_S if known else UNKNOWN_S)
