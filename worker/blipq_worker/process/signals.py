"""How many signals to end a process got."""

import time
from collections.abc import Callable

#: So soon after the first signal another one is its echo.
ECHO_S = 1.0


class EndSignals:
    """Tells a second signal from an echo of the first.

    Who signals a whole group, as systemd does when it stops a unit, reaches a process twice:
    directly, and by its parent. within_s: what comes so soon after the first is an echo.
    """

    def __init__(self, within_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._within_s = within_s
        self._clock = clock
        self._first: float | None = None

    @property
    def has_come(self) -> bool:
        """Whether there was a signal."""
        return self._first is not None

    def is_echo(self) -> bool:
        """Notes a signal; whether it says nothing new."""
        if self._first is None:
            self._first = self._clock()
            return False
        return self._clock() - self._first < self._within_s
