"""How many jobs end in a second, from when the last thousand ended."""

from collections.abc import Sequence
from dataclasses import dataclass

#: A chart looks back no further than this, in this many steps.
WINDOW_S = 600.0
STEPS = 60


@dataclass(frozen=True, slots=True)
class Rate:
    """Jobs that ended a second, in each step of the window, the latest last."""

    window_s: float
    values: Sequence[float]

    @property
    def empty(self) -> bool:
        """Whether nothing ended in the window."""
        return not any(self.values)

    @property
    def steps(self) -> list[tuple[float, float]]:
        """How many seconds ago each step began, and its value."""
        step = self.window_s / len(self.values)
        return [
            ((len(self.values) - place) * step, value) for place, value in enumerate(self.values)
        ]

    @property
    def mean(self) -> float:
        """Over the last minute, or the window where that is shorter."""
        step = self.window_s / STEPS
        steps = max(1, min(STEPS, round(60 / step)))
        return sum(self.values[-steps:]) / steps

    @property
    def most(self) -> float:
        """The highest value."""
        return max(self.values)


def rate_of(now: float, ended: Sequence[float], most: int = 1000) -> Rate:
    """The rate over the last ten minutes, or over the time that the ledger knows all ends of.

    ``ended``: the latest first. Where they are ``most``, there may have been others before.
    """
    window = WINDOW_S
    if len(ended) >= most:
        window = min(window, max(1.0, now - ended[-1]))
    step = window / STEPS
    counts = [0] * STEPS
    for at in ended:
        if 0 <= (place := int((now - at) / step)) < STEPS:
            counts[STEPS - 1 - place] += 1
    return Rate(window, [number / step for number in counts])
