"""Uploads found by listing: what is new since the last listing, and what is there at all.

A listing is in the order of keys, so a new object may stand anywhere in it: each looks at all keys,
and takes what was modified since the last one began. S3 dates an object to when its upload began
and may show it later, so each also takes what is older by ``overlap`` and was not seen before.
After a restart that is seen again, and found to have its job.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial

from blipq.watch.cursor import Cursor
from blipq.watch.objects import Objects, Upload
from blipq.watch.sources import Batch, Found

Place = tuple[str, str]


@dataclass
class Part(Batch):
    """A page of a listing."""

    on_done: Callable[[set[Found]], None] = field(kw_only=True)

    def done(self, refused: set[Found]) -> None:
        """The page is not read again, except for what is refused."""
        self.on_done(refused)


class Listing:
    """Lists the places again and again; the time of the last whole listing is the cursor."""

    def __init__(
        self,
        objects: Objects,
        places: Sequence[Place],
        cursor: Cursor,
        *,
        every_s: float,
        overlap_s: float,
    ) -> None:
        self.pause_s = every_s
        self._objects = objects
        self._places = places
        self._cursor = cursor
        self._overlap = timedelta(seconds=overlap_s)
        self._seen: dict[str, datetime] = {}
        self._parts: Iterator[Batch] | None = None
        self._listed_at: datetime | None = None

    def next(self) -> Batch | None:
        """What is new on the next page that has something new; None after the last page."""
        if self._parts is None:
            self._parts = self._list()
        try:
            batch = next(self._parts, None)
        except BaseException:
            self._parts = None  # the whole listing again
            raise
        if batch is None:
            self._parts = None
        return batch

    def close(self) -> None:
        """Nothing is kept from others."""

    def _list(self) -> Iterator[Batch]:
        began: datetime | None = None
        for bucket, prefix in self._places:
            for page in self._objects.pages(bucket, prefix):
                began = began or page.asked_at
                self._listed_at = self._listed_at or listed_at(self._cursor, began)
                if new := self._new(page.uploads, self._listed_at - self._overlap):
                    yield Part(list(new), on_done=partial(self._remember, new))
        if began is not None:
            self._listed_at = began
            self._cursor.save({**self._cursor.load(), "listed_at": began.isoformat()})
            self._forget(began - self._overlap)

    def _new(self, uploads: Sequence[Upload], horizon: datetime) -> list[Upload]:
        return [
            upload
            for upload in uploads
            if upload.modified >= horizon and upload.identity not in self._seen
        ]

    def _remember(self, uploads: Sequence[Upload], refused: set[Found]) -> None:
        """What is refused is looked at again, while ``overlap`` reaches it: it may be let in."""
        self._seen |= {
            upload.identity: upload.modified for upload in uploads if upload not in refused
        }

    def _forget(self, horizon: datetime) -> None:
        self._seen = {each: at for each, at in self._seen.items() if at >= horizon}


def listed_at(cursor: Cursor, now: datetime) -> datetime:
    """When the last whole listing began. On the first start that is now, and is kept at once.

    Else what is uploaded while a first listing or a backfill runs, and is cut short, would be lost.
    """
    state = cursor.load()
    if "listed_at" not in state:
        cursor.save({**state, "listed_at": now.isoformat()})
        return now
    return datetime.fromisoformat(state["listed_at"])


class Backfill:
    """Lists the places once, from where the last run of it got to."""

    pause_s = 0.0

    def __init__(self, objects: Objects, places: Sequence[Place], cursor: Cursor) -> None:
        self._objects = objects
        self._places = places
        self._cursor = cursor
        self._parts: Iterator[Batch] | None = None

    def next(self) -> Batch | None:
        """The next page; None when all is listed, and then a next run begins anew."""
        if self._parts is None:
            self._parts = self._list()
        try:
            batch = next(self._parts, None)
        except BaseException:
            self._parts = None
            raise
        if batch is None:
            self._cursor.save({**self._cursor.load(), "backfill": {}})
        return batch

    def close(self) -> None:
        """Nothing is kept from others."""

    def _list(self) -> Iterator[Batch]:
        for bucket, prefix in self._places:
            place = f"s3://{bucket}/{prefix}"
            after = self._cursor.load().get("backfill", {}).get(place, "")
            for page in self._objects.pages(bucket, prefix, after):
                listed_at(self._cursor, page.asked_at)
                if page.uploads:
                    last = page.uploads[-1].key
                    yield Part(
                        list(page.uploads),
                        on_done=partial(self._save, place, last),
                    )

    def _save(self, place: str, last: str, refused: set[Found]) -> None:
        """What is refused has been logged, and is passed over."""
        state = self._cursor.load()
        self._cursor.save({**state, "backfill": {**state.get("backfill", {}), place: last}})
