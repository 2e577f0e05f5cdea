"""What a bulk leaves to others: how fast it submits, in all and for each web host, and until when.

Jobs of a bulk have the low priority, so that any other job comes first; this is for what a priority
cannot help: hosts of strangers that pictures come from, and hours in which a fleet is somebody
else's.
"""

import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from urllib.parse import urlsplit

from blipq.bulk.journal import OpenLine
from blipq.errors import InvalidRequest

#: Pictures a second from one web host, by default.
HOST_RATE = 20.0


@dataclass(frozen=True, slots=True)
class Manners:
    """rate: lines submitted a second; None is as fast as it goes.

    host_rate: lines a second whose pictures come from the same web host. until: when the last line
    is submitted.
    """

    rate: float | None = None
    host_rate: float | None = HOST_RATE
    until: datetime | None = None

    @property
    def is_over(self) -> bool:
        """Whether no line is submitted any more."""
        return self.until is not None and datetime.now(UTC) >= self.until


#: By default.
POLITE = Manners()


class Pace:
    """So many a second. Time in which nothing went makes up for one second, or for one at least."""

    def __init__(self, rate: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._each_s = 1 / rate if rate else 0.0
        self._most_s = max(1.0, self._each_s)
        self._free_at = clock() - self._each_s

    def room(self, most: int) -> int:
        """How many may go now."""
        if not self._each_s:
            return most
        now = self._clock()
        self._free_at = max(self._free_at, now - self._most_s)
        # A hair more: of a wait of exactly 1 / rate nothing may be lost to rounding.
        return max(0, min(most, int((now - self._free_at) / self._each_s + 1e-6)))

    def took(self, count: int) -> None:
        """Counts what went."""
        self._free_at += count * self._each_s

    @property
    def is_idle(self) -> bool:
        """Whether a new pace would allow no more than this one."""
        return self._clock() - self._free_at >= self._each_s


class Hosts:
    """Lines that wait until the web host of their picture may be visited again, in order.

    They count as part of the window, which bounds them.
    """

    def __init__(self, rate: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._clock = clock
        self._waiting: dict[str, deque[OpenLine]] = {}
        self._paces: dict[str, Pace] = {}

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def admitted(self, lines: Sequence[OpenLine]) -> list[OpenLine]:
        """Those of more lines, and of the waiting ones, that may go now."""
        if not self._rate:
            return list(lines)
        go = []
        for line in lines:
            host = host_of(line.work)
            if host is None:
                go.append(line)
            else:
                self._waiting.setdefault(host, deque()).append(line)
        return go + list(self._due())

    def all(self) -> list[OpenLine]:
        """All that wait; nothing waits any more."""
        found = [line for lines in self._waiting.values() for line in lines]
        self._waiting.clear()
        return found

    def _due(self) -> Iterator[OpenLine]:
        for host, lines in list(self._waiting.items()):
            pace = self._paces.setdefault(host, Pace(self._rate, self._clock))
            count = pace.room(len(lines))
            pace.took(count)
            for _ in range(count):
                yield lines.popleft()
            if not lines:
                del self._waiting[host]
        # A dataset may name any number of hosts: those that wait for nothing are forgotten.
        self._paces = {
            host: pace
            for host, pace in self._paces.items()
            if host in self._waiting or not pace.is_idle
        }


def host_of(work: str) -> str | None:
    """The web host that a line's picture comes from; None for S3, and for no picture."""
    uri = (json.loads(work)["request"].get("image") or {}).get("uri", "")
    return None if uri.startswith("s3://") else urlsplit(uri).hostname


def next_time(text: str) -> datetime:
    """When it is ``HH:MM`` next, on this machine's clock. Raises InvalidRequest."""
    try:
        at = datetime.strptime(text, "%H:%M").time()
    except ValueError:
        raise InvalidRequest(f"--until {text}: a time of day is expected, such as 06:00") from None
    now = datetime.now()
    today = datetime.combine(now, at)
    # As a naive time until here: a day on which clocks change has 23 or 25 hours.
    return (today if today > now else today + timedelta(days=1)).astimezone(UTC)
