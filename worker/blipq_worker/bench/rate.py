"""How fast work goes once it has begun and before it ends."""

from collections.abc import Sequence


def steady_per_s(done: Sequence[float], held: int) -> float:
    """Results a second between the ``held``-th and the ``held``-th last of them.

    done: when each was done, in seconds. Several are often done together: what is counted is what
    was done after the first moment and up to the last.
    """
    ordered = sorted(done)
    first, last = ordered[held - 1], ordered[-held - 1]
    return sum(first < each <= last for each in ordered) / (last - first)
