"""How much memory Redis will take when as many jobs are kept as their times to live allow.

A sample of the records gives their size, how long they are kept, and since when they have come:
no count is kept for that, and a sample costs Redis the same however many there are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import redis

from blipq.ledger import keys

#: Keys that are drawn, and the fewest ended jobs among them that say something.
DRAWN, FEWEST = 300, 20
#: Jobs that have come for less than this say little of the day.
SHORTEST_S = 60.0
#: The share of its memory above which Redis has too little left to rewrite its file.
TOO_MUCH = 0.7


@dataclass(frozen=True, slots=True)
class Record:
    """A job that has ended: its bytes, its age since then, and how long it is kept in all."""

    size: int
    age_s: float
    kept_s: float


@dataclass(frozen=True, slots=True)
class Forecast:
    """Bytes. ``limit`` is Redis' own or, without one, its machine's; 0 if unknown.

    ``rate`` is of jobs that ended per second, ``size`` the bytes of one and ``kept_s`` how long it
    is kept, on average. ``later`` is what Redis will hold if that goes on.
    """

    used: int
    limit: int
    rate: float
    size: float
    kept_s: float
    later: float

    @property
    def too_much(self) -> bool:
        """Whether Redis will be short of memory."""
        return self.limit > 0 and self.later > TOO_MUCH * self.limit


def forecast(client: "redis.Redis") -> Forecast | None:
    """What is to come; None while too little has, or where Redis does not say."""
    try:
        info = client.info("memory")
        records = _sample(client)
        total = int(client.dbsize())
    except redis.ResponseError:  # a managed Redis may not allow MEMORY USAGE
        return None
    limit = int(info.get("maxmemory") or info.get("total_system_memory") or 0)
    return expected(records, total, int(info["used_memory"]), limit)


def expected(records: Sequence[Record], total: int, used: int, limit: int) -> Forecast | None:
    """The forecast from a sample of DRAWN keys out of ``total``, or None."""
    span = max((record.age_s for record in records), default=0.0)
    if len(records) < FEWEST or span < SHORTEST_S:
        return None
    count = total * len(records) / DRAWN
    size, kept = (fmean(getattr(each, name) for each in records) for name in ("size", "kept_s"))
    more = max(1.0, kept / span) - 1
    return Forecast(used, limit, count / span, size, kept, used + more * count * size)


def _sample(client: "redis.Redis") -> list[Record]:
    with client.pipeline(transaction=False) as pipe:
        for _ in range(DRAWN):
            pipe.randomkey()
        drawn = [key for key in pipe.execute() if key and key.startswith(keys.job(""))]
        for key in drawn:
            pipe.hget(key, "completed_at")
            pipe.pttl(key)
            pipe.memory_usage(key)
        seconds, _ = client.time()
        found = pipe.execute()
    ended = zip(found[::3], found[1::3], found[2::3], strict=True)
    return [_record(seconds, *each) for each in ended if None not in each]


def _record(now: float, completed_at: str, left_ms: int, size: int) -> Record:
    age = max(0.0, now - float(completed_at) / 1000)
    return Record(size, age, age + left_ms / 1000)
