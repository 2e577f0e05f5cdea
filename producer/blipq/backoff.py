"""Exponential backoff: how long to wait before something is tried again."""

import random
from dataclasses import dataclass

# 1.5 ** 64 is beyond every cap. A loop that waits for Redis counts on, and 2.0 ** 1024 overflows.
_LAST_POWER = 64


@dataclass(frozen=True, slots=True)
class Backoff:
    """Pauses from ``first_s`` seconds that grow by ``factor``, to at most ``last_s`` seconds.

    ``jitter``: each pause is multiplied by a random number from ``1 - jitter`` to ``1 + jitter``,
    so that those who failed together do not try again together.
    """

    first_s: float
    last_s: float
    factor: float = 2.0
    jitter: float = 0.0

    def pause_s(self, tries: int) -> float:
        """Seconds to wait after ``tries`` earlier pauses in a row: 0 gives the first pause."""
        pause = min(self.first_s * self.factor ** min(tries, _LAST_POWER), self.last_s)
        return pause * random.uniform(1.0 - self.jitter, 1.0 + self.jitter)
