"""Whether something that should go on has stopped."""

import time
from collections.abc import Callable

#: Between two looks no more than this counts: who did not run itself blames nobody for it.
_MOST_BETWEEN_S = 1.0


class Silence:
    """How long a sign of life has been the same, in time in which this process ran."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._looked = clock()
        self._sign: object = None
        self._for = 0.0

    def after(self, sign: object) -> float:
        """Seconds since the sign last changed, as far as these calls show it."""
        now = self._clock()
        self._for += min(now - self._looked, _MOST_BETWEEN_S)
        self._looked = now
        if sign != self._sign:
            self._sign, self._for = sign, 0.0
        return self._for
