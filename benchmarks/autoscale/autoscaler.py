"""KEDA and the HorizontalPodAutoscaler that it makes, as functions of time and of one metric."""

import math
from collections import deque
from dataclasses import dataclass, replace

#: The HPA leaves the number of pods alone while the metric is this close to its target.
TOLERANCE = 0.1


@dataclass(frozen=True)
class Scaling:
    """What the chart's ScaledObject says. Times in seconds; ``target``: of the metric, for a pod.

    With at most four pods its policies for scaling up (four pods within 30 s) never bind, so they
    are not here. Scaling down: one pod within ``down_s``, which is more than a quarter of four.
    """

    max: int = 4
    target: float = 60.0
    polling_s: float = 15.0
    cooldown_s: float = 600.0
    stabilization_s: float = 300.0
    down_s: float = 60.0
    costs_s: float = 15.0

    def faster(self, speed: float) -> "Scaling":
        """The same with all times divided, also of the work that a pod should have."""
        return replace(
            self,
            target=self.target / speed,
            polling_s=self.polling_s / speed,
            cooldown_s=self.cooldown_s / speed,
            stabilization_s=self.stabilization_s / speed,
            down_s=self.down_s / speed,
            costs_s=self.costs_s / speed,
        )


class Autoscaler:
    """Says how many pods there should be: between 0 and 1 as KEDA does, above that as the HPA."""

    def __init__(self, scaling: Scaling) -> None:
        self._scaling = scaling
        self._active_at = -math.inf
        self._recent: deque[tuple[float, int]] = deque()
        self._removed_at = -math.inf

    def pods(self, now: float, present: int, metric: float) -> int:
        """How many there should be. metric: its sum, of which each pod should have the target."""
        if metric > 0:
            self._active_at = now
        elif now - self._active_at >= self._scaling.cooldown_s:
            self._recent.clear()
            return 0
        if not present:
            return int(metric > 0)
        wanted = self._recommended(present, metric)
        self._recent.append((now, wanted))
        while self._recent[0][0] < now - self._scaling.stabilization_s:
            self._recent.popleft()
        if wanted >= present:
            return wanted
        # The highest recommendation within the window holds; then one pod at a time.
        wanted = min(present, max(each for _, each in self._recent))
        if wanted == present or now - self._removed_at < self._scaling.down_s:
            return present
        self._removed_at = now
        return present - 1

    def _recommended(self, present: int, metric: float) -> int:
        if abs(metric / (self._scaling.target * present) - 1) <= TOLERANCE:
            return present
        return min(self._scaling.max, max(1, math.ceil(metric / self._scaling.target)))
