"""Lists of jobs for people, the newest first: by status, kind, model, tenant and time, in pages.

``common.lua`` keeps a list for each hour, tenant, model, kind and status. The lists that may hold
what is wanted are merged, hour by hour. What has no list of its own, a job's metadata, is compared
record by record, and no page goes through more than so many of them.
"""

import heapq
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple, cast

from blipq.contract import JobInfo, Kind, Status
from blipq.ledger import codec, keys
from blipq.ledger.connection import redis_errors
from blipq.ledger.scripts.runner import ScriptRunner

HOUR_MS = 3_600_000
#: Records that one page goes through, at most, and names of lists.
MOST_READ = 5_000
MOST_LISTS = 20_000
#: Records, names and jobs that one round trip reads.
CHUNK = 200
_NAMES = 1000
#: Of each list at first: what many lists are merged from is mostly not needed.
_FEWEST, _MOST = 10, 1000
_OPEN = "open"


class Place(NamedTuple):
    """Where a job stands in a list: by when it was submitted, in milliseconds, then by its id."""

    ms: int
    id: str

    @property
    def at(self) -> datetime:
        """When jobs of this place were submitted."""
        return datetime.fromtimestamp(self.ms / 1000, UTC)


@dataclass(frozen=True, slots=True)
class ListName:
    """The name of a list. ``status`` is ``open`` until a job has ended."""

    hour: int
    tenant: str
    model: str
    kind: str
    status: str

    @classmethod
    def of(cls, text: str) -> "ListName":
        """A name as the scripts write it."""
        hour, *rest = text.split(":")
        return cls(int(hour), *rest)

    @property
    def key(self) -> str:
        """The list in Redis."""
        return keys.listed(":".join(map(str, (self.hour, *self._rest))))

    @property
    def _rest(self) -> tuple[str, ...]:
        return self.tenant, self.model, self.kind, self.status


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a list is of. None is any; a ``tenant`` of "" is none. ``until`` is exclusive."""

    status: Status | None = None
    kind: Kind | None = None
    model: str | None = None
    tenant: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    def is_in(self, name: ListName) -> bool:
        """Whether a list may hold such jobs."""
        open_ = self.status in (Status.QUEUED, Status.RUNNING)
        status = _OPEN if open_ else self.status
        pairs = zip((self.tenant, self.model, self.kind, status), name._rest, strict=True)
        return all(wanted is None or wanted == found for wanted, found in pairs)

    def has(self, info: JobInfo) -> bool:
        """Whether a job is one of these."""
        pairs = (
            (self.status, info.status),
            (self.kind, info.kind),
            (self.model, info.model),
            (self.tenant, info.tenant or ""),
            *((text, info.metadata.get(name)) for name, text in self.metadata.items()),
        )
        return all(wanted is None or wanted == found for wanted, found in pairs)

    @property
    def first_ms(self) -> int:
        """The earliest time of a job."""
        return 0 if self.since is None else _ms(self.since)


@dataclass(frozen=True, slots=True)
class Page:
    """Jobs of a list. ``next``: the place behind which the next page begins, None at the end.

    A page may hold fewer jobs than its limit, even none, and have a next one: where ``read``, the
    records that were gone through, came to the bound.
    """

    jobs: list[JobInfo]
    next: Place | None
    read: int


class Listing(ScriptRunner):
    """Reads lists of jobs. Raises QueueUnavailable."""

    def page(self, wanted: Wanted, *, limit: int, after: Place | None = None) -> Page:
        """At most ``limit`` jobs behind a place. Results are left out: they may be large."""
        with redis_errors():
            seconds, _ = self.redis.time()
            start = Place((seconds + 1) * 1000, "")
            if wanted.until is not None:
                start = min(start, Place(_ms(wanted.until), ""))
            start = start if after is None else min(start, after)
            if wanted.status is Status.RUNNING:
                return self._running(wanted, start, limit)
            return self._paged(wanted, start, limit)

    def newest(self, name: str, limit: int) -> list[str]:
        """One field of the newest jobs, as it is stored; "" of those without."""
        with redis_errors():
            seconds, _ = self.redis.time()
            walk = _Walk(self, Wanted(), Place((seconds + 1) * 1000, ""), limit)
            return self._field(name, list(itertools.islice(walk, limit)))

    def _paged(self, wanted: Wanted, start: Place, limit: int) -> Page:
        walk = _Walk(self, wanted, start, limit)
        size = CHUNK if wanted.metadata else min(CHUNK, limit + 1)
        found: list[tuple[Place, JobInfo]] = []
        read, last = 0, start
        places = iter(walk)
        while chunk := list(itertools.islice(places, min(size, MOST_READ - read))):
            candidates = self._with_metadata(wanted, chunk)
            infos = dict(zip(candidates, self._records(candidates), strict=True))
            for place in chunk:
                last, read = place, read + 1
                info = infos.get(place)
                if info is not None and wanted.has(info):
                    found.append((place, info))
                if len(found) > limit:
                    return _page(found, limit, read)
        following = None if read < MOST_READ and walk.is_done else min(last, walk.reached)
        return Page([info for _, info in found], following, read)

    def _running(self, wanted: Wanted, start: Place, limit: int) -> Page:
        """All that run are few: as many as workers have threads."""
        ids = cast("list[str]", self.redis.zrange(keys.RUNNING, 0, MOST_READ - 1))
        found = [
            info
            for at in range(0, len(ids), CHUNK)
            for info in self._records([Place(0, id) for id in ids[at : at + CHUNK]])
            if info is not None and wanted.has(info)
        ]
        placed = [(Place(_ms(info.created_at), info.id), info) for info in found]
        placed.sort(key=lambda each: each[0])
        rest = [each for each in placed[::-1] if wanted.first_ms <= each[0].ms and each[0] < start]
        return _page(rest, limit, len(ids))

    def _with_metadata(self, wanted: Wanted, places: list[Place]) -> list[Place]:
        """Those with the pairs that are wanted: few may have them, and whole records cost more."""
        if not wanted.metadata:
            return places
        pairs = wanted.metadata.items()
        return [
            place
            for place, text in zip(places, self._field("metadata", places), strict=True)
            if text and pairs <= json.loads(text).items()
        ]

    def _field(self, name: str, places: Sequence[Place]) -> list[str]:
        return cast("list[str]", self._run("field", name, *(place.id for place in places)))

    def _records(self, places: Sequence[Place]) -> list[JobInfo | None]:
        if not places:
            return []
        ids = [place.id for place in places]
        answers = cast("list[Any]", self._run("listed", *ids))
        return [codec.job_of(id, answer) for id, answer in zip(ids, answers, strict=True)]

    # -- what a walk reads --

    def names(self, first: int, last: int, skip: int) -> list[str]:
        """Names of the lists of these hours, the latest first."""
        found = self.redis.zrevrangebyscore(keys.LISTS, last, first, start=skip, num=_NAMES)
        return cast("list[str]", found)

    def members(
        self, names: Sequence[ListName], before: Place, first_ms: int, skip: int, count: int
    ) -> list[list[Place]]:
        """Of each list so many members from the time of a place downwards, but the first ones."""
        pipeline = self.redis.pipeline(transaction=False)
        for name in names:
            pipeline.zrevrangebyscore(
                name.key, before.ms, first_ms, start=skip, num=count, withscores=True
            )
        return [[Place(int(ms), id) for id, ms in found] for found in pipeline.execute()]


def _page(found: Sequence[tuple[Place, JobInfo]], limit: int, read: int) -> Page:
    """A page of what was found, with a next one if that is more than the limit."""
    following = found[limit - 1][0] if len(found) > limit else None
    return Page([info for _, info in found[:limit]], following, read)


class _Walk:
    """The places of all jobs that may be wanted, the newest first.

    ``reached``: the beginning of the hours whose lists are read. ``is_done``: no list is left.
    """

    def __init__(self, listing: Listing, wanted: Wanted, start: Place, limit: int) -> None:
        self._listing = listing
        self._wanted = wanted
        self._start = start
        self._limit = limit
        self.reached = start
        self.is_done = False

    def __iter__(self) -> Iterator[Place]:
        # A job that ends meanwhile goes from one list of its hour to another: it may be seen twice.
        last = None
        for place in self._places():
            if place != last:
                yield place
            last = place

    def _places(self) -> Iterator[Place]:
        seen = 0
        for hour, names in itertools.groupby(self._names(), key=lambda name: name.hour):
            all_names = list(names)
            wanted = [name for name in all_names if self._wanted.is_in(name)]
            # Open ones first: a job that ends in between is seen twice, and not never.
            wanted.sort(key=lambda name: name.status != _OPEN)
            yield from self._merged(wanted)
            self.reached = min(self._start, Place(hour * HOUR_MS, ""))
            seen += len(all_names)
            if seen >= MOST_LISTS:
                return
        self.is_done = True

    def _names(self) -> Iterator[ListName]:
        """Of all lists that may hold such jobs, and of others of the same hours."""
        first, last = self._wanted.first_ms // HOUR_MS, self._start.ms // HOUR_MS
        for skip in itertools.count(0, _NAMES):
            found = self._listing.names(first, last, skip)
            yield from map(ListName.of, found)
            if len(found) < _NAMES:
                return

    def _merged(self, names: Sequence[ListName]) -> Iterator[Place]:
        if not names:
            return
        count = max(_FEWEST, 2 * self._limit // len(names))
        chunks = self._read(names, self._start, 0, count)
        lists = (self._rest(name, chunk, count) for name, chunk in zip(names, chunks, strict=True))
        yield from heapq.merge(*lists, reverse=True)

    def _rest(self, name: ListName, chunk: list[Place], count: int) -> Iterator[Place]:
        """A list, of which a chunk is read already.

        Many jobs may have been submitted in the same millisecond: those before the place are passed
        over.
        """
        before, skip = self._start, 0
        while True:
            fresh = [place for place in chunk if place < before]
            yield from fresh
            if len(chunk) < count:
                return
            before, skip = (fresh[-1], 0) if fresh else (before, skip + count)
            count = min(2 * count, _MOST)  # a list that is read on is read in longer parts
            (chunk,) = self._read([name], before, skip, count)

    def _read(
        self, names: Sequence[ListName], before: Place, skip: int, count: int
    ) -> list[list[Place]]:
        return self._listing.members(names, before, self._wanted.first_ms, skip, count)


def _ms(time: datetime) -> int:
    return round(time.timestamp() * 1000)
