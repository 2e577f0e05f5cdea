"""Memory and open files of processes over time, and which of them grow.

A process is judged by the later part of its life: until then it fills its caches, whose sizes are
bounded. Its memory is what it has for itself (USS).
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import psutil

from blipq.local.supervisor import Service

#: Bounds for an hour, by the line through the later part of a life: memory may grow by so many MiB,
#: or by so large a share of what it is. Files at the end may be so many more than at its beginning.
MOST_MIB, MOST_SHARE, MOST_FILES = 24.0, 0.05, 16
#: A life is judged from this part on, if it lasted for so many seconds.
WARM_SHARE, SHORTEST_S = 0.4, 300.0


@dataclass(frozen=True)
class Sample:
    """A process at a time."""

    at_s: float
    mib: float
    files: int


@dataclass(frozen=True)
class Growth:
    """How a process grew. ``mib_an_hour`` is the slope of the line through its later samples.

    mib: what it had after each quarter of its life.
    """

    role: str
    minutes: float
    mib: tuple[float, ...]
    mib_an_hour: float
    files: int
    more_files: int

    @property
    def is_flat(self) -> bool:
        """Whether it stayed within the bounds."""
        most = max(MOST_MIB, MOST_SHARE * self.mib[-1])
        return self.mib_an_hour <= most and self.more_files <= MOST_FILES


def growth_of(role: str, samples: Sequence[Sample]) -> Growth | None:
    """How it grew, or None if it lived too briefly to say."""
    lived_s = samples[-1].at_s - samples[0].at_s
    if lived_s < SHORTEST_S:
        return None
    warm_at = samples[0].at_s + WARM_SHARE * lived_s
    warm = [each for each in samples if each.at_s >= warm_at]
    line = statistics.linear_regression([each.at_s for each in warm], [each.mib for each in warm])
    part = max(1, len(warm) // 4)
    first, last = (max(each.files for each in some) for some in (warm[:part], warm[-part:]))
    quarters = tuple(samples[len(samples) * n // 4 - 1].mib for n in (1, 2, 3, 4))
    return Growth(role, lived_s / 60, quarters, line.slope * 3600, last, last - first)


class Watch:
    """Takes samples of services and of all their children."""

    def __init__(self, services: Mapping[str, Service]) -> None:
        self._services = services
        self._samples: dict[tuple[str, int, float], list[Sample]] = defaultdict(list)

    def sample(self) -> None:
        """Notes how each process is now."""
        at_s = time.monotonic()
        for role, process in self._processes():
            with suppress(psutil.Error):  # it has just ended
                mib = process.memory_full_info().uss / 2**20
                sample = Sample(at_s, mib, process.num_fds())
                self._samples[role, process.pid, process.create_time()].append(sample)

    def _processes(self) -> Iterator[tuple[str, psutil.Process]]:
        for name, service in self._services.items():
            if (pid := service.pid) is None:
                continue
            with suppress(psutil.Error):
                parent = psutil.Process(pid)
                yield name, parent
                for child in parent.children(recursive=True):
                    with suppress(psutil.Error):
                        yield f"{name}: {_part(child)}", child

    def found(self) -> list[Growth]:
        """How each process grew that lived for long enough."""
        grown = [growth_of(role, samples) for (role, *_), samples in self._samples.items()]
        return sorted(filter(None, grown), key=lambda each: each.role)


def _part(process: psutil.Process) -> str:
    words = process.cmdline()
    for part in ("engine", "front", "decode"):
        if part in words[1:6]:
            return part
    return process.name()
