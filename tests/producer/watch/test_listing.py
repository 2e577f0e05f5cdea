"""Uploads found by listing a real S3 server."""

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from blipq import Client, InvalidRequest
from blipq.ledger.operator import OperatorLedger
from blipq.watch.cursor import Cursor, FileCursor, RedisCursor, Unsaved
from blipq.watch.listing import Backfill, Listing
from blipq.watch.objects import Objects, Page, Upload
from blipq.watch.sources import Source

Put = Callable[..., None]
NOW = datetime(2026, 11, 25, 12, tzinfo=UTC)


@pytest.fixture
def cursor(tmp_path: Path) -> FileCursor:
    return FileCursor(tmp_path / "state.json")


def taken(source: Source, *, done: bool = True) -> list[str]:
    """The keys that a source tells of until it has nothing more."""
    keys = []
    while (batch := source.next()) is not None:
        keys += [found.key for found in batch.found]
        if done:
            batch.done(set())
    return keys


class FakeObjects(Objects):
    """A listing whose clock and dates the test sets."""

    def __init__(self) -> None:
        self.now = NOW
        self.there: dict[str, datetime] = {}

    def pages(self, bucket: str, prefix: str, after: str = "") -> Any:
        uploads = [
            Upload(bucket, key, "e", 1, at) for key, at in sorted(self.there.items()) if key > after
        ]
        yield Page(uploads[:2], self.now)
        if uploads[2:]:
            yield Page(uploads[2:], self.now + timedelta(seconds=1))


@pytest.fixture
def fake() -> FakeObjects:
    return FakeObjects()


def listing(objects: Objects, cursor: Cursor, bucket: str = "photos", prefix: str = "") -> Listing:
    return Listing(objects, [(bucket, prefix)], cursor, every_s=1, overlap_s=600)


# --- S3 -------------------------------------------------------------------------------------------


def test_head_and_listing_agree_on_an_uploads_identity(
    objects: Objects, bucket: str, put: Put
) -> None:
    """An event and a backfill that find the same upload must make one job."""
    put("ü/a b+c%.jpg")
    (page,) = objects.pages(bucket, "")
    (listed,) = page.uploads
    asked = objects.head(bucket, "ü/a b+c%.jpg")
    assert asked is not None
    assert (asked.identity, asked.etag, asked.size) == (listed.identity, listed.etag, 5)
    assert asked.content_type == "image/jpeg"


def test_an_object_that_is_gone_is_none(objects: Objects, bucket: str) -> None:
    assert objects.head(bucket, "gone.jpg") is None


def test_a_listing_goes_on_behind_a_key(objects: Objects, bucket: str, put: Put) -> None:
    for key in ("a", "b", "c"):
        put(key)
    assert [each.key for page in objects.pages(bucket, "", "a") for each in page.uploads] == [
        "b",
        "c",
    ]


def test_a_bucket_that_is_not_there_is_an_error(objects: Objects) -> None:
    with pytest.raises(
        InvalidRequest, match=r"no such bucket: .*s3://no-such-bucket/in/: .*NoSuch"
    ):
        list(objects.pages("no-such-bucket", "in/"))


def test_new_objects_are_found_wherever_they_stand(
    objects: Objects, bucket: str, put: Put, cursor: FileCursor
) -> None:
    source = listing(objects, cursor, bucket)
    put("m.jpg")
    assert taken(source) == ["m.jpg"]
    put("a.jpg")
    put("z.jpg")
    assert taken(source) == ["a.jpg", "z.jpg"]
    assert taken(source) == []


def test_an_object_that_is_replaced_is_new(
    objects: Objects, bucket: str, put: Put, cursor: FileCursor
) -> None:
    source = listing(objects, cursor, bucket)
    put("a.jpg", b"one")
    assert taken(source) == ["a.jpg"]
    put("a.jpg", b"two")
    assert taken(source) == ["a.jpg"]


def test_the_same_bytes_put_back_are_new(
    objects: Objects, bucket: str, put: Put, cursor: FileCursor
) -> None:
    """The sidecar of the version between them is wrong for it."""
    source = listing(objects, cursor, bucket)
    put("a.jpg", b"one")
    assert taken(source) == ["a.jpg"]
    put("a.jpg", b"two")
    assert taken(source) == ["a.jpg"]
    time.sleep(1.1)  # S3 dates in seconds
    put("a.jpg", b"one")
    assert taken(source) == ["a.jpg"]


# --- the cursor -----------------------------------------------------------------------------------


def test_what_was_there_long_before_the_first_start_is_left_alone(
    fake: FakeObjects, cursor: FileCursor
) -> None:
    fake.there = {"old": NOW - timedelta(hours=1), "new": NOW}
    assert taken(listing(fake, cursor)) == ["new"]


def test_what_came_while_nobody_watched_is_found(fake: FakeObjects, cursor: FileCursor) -> None:
    assert taken(listing(fake, cursor)) == []
    fake.there = {"a": NOW + timedelta(minutes=5), "b": NOW + timedelta(hours=5)}
    fake.now = NOW + timedelta(days=1)
    assert taken(listing(fake, cursor)) == ["a", "b"]


def test_a_first_listing_that_was_cut_short_begins_again_where_it_began(
    fake: FakeObjects, cursor: FileCursor
) -> None:
    """What came between a kill in the first listing and the next start was lost."""
    fake.there = {"c": NOW}
    assert listing(fake, cursor).next() is not None
    fake.there["a"] = NOW + timedelta(seconds=5)
    fake.now = NOW + timedelta(hours=3)
    assert taken(listing(fake, cursor)) == ["a", "c"]


def test_an_object_that_shows_late_is_found_within_the_overlap(
    fake: FakeObjects, cursor: FileCursor
) -> None:
    """S3 dates a multipart upload to its beginning and shows it when it is complete."""
    source = listing(fake, cursor)
    fake.there = {"a": NOW}
    assert taken(source) == ["a"]
    fake.now += timedelta(minutes=1)
    fake.there["late"] = NOW - timedelta(minutes=5)
    assert taken(source) == ["late"]


def test_what_is_not_done_comes_again(fake: FakeObjects, cursor: FileCursor) -> None:
    source = listing(fake, cursor)
    fake.there = {"a": NOW}
    assert taken(source, done=False) == ["a"]
    assert taken(source) == ["a"]
    assert taken(source) == []


def test_what_was_seen_is_forgotten_when_no_listing_asks_for_it(
    fake: FakeObjects, cursor: FileCursor
) -> None:
    source = listing(fake, cursor)
    fake.there = {str(n): NOW for n in range(100)}
    assert len(taken(source)) == 100
    fake.now += timedelta(hours=1)
    assert taken(source) == []
    assert not source._seen


def test_a_backfill_takes_everything_and_goes_on_where_it_was_killed(
    fake: FakeObjects, cursor: FileCursor
) -> None:
    fake.there = {key: NOW - timedelta(days=9) for key in "abcd"}
    killed = Backfill(fake, [("photos", "")], cursor)
    batch = killed.next()
    assert batch is not None
    batch.done(set())
    assert taken(Backfill(fake, [("photos", "")], cursor)) == ["c", "d"]
    assert taken(Backfill(fake, [("photos", "")], cursor)) == ["a", "b", "c", "d"]


def test_what_comes_during_a_backfill_is_found_by_the_first_listing(
    fake: FakeObjects, cursor: FileCursor
) -> None:
    fake.there = {"x": NOW - timedelta(days=9)}
    assert taken(Backfill(fake, [("photos", "")], cursor)) == ["x"]
    fake.there["a"] = NOW + timedelta(minutes=1)
    fake.now = NOW + timedelta(hours=2)
    assert taken(listing(fake, cursor)) == ["a"]


def test_a_cursor_in_redis_expires_long_after_it_was_used(client: Client) -> None:
    ledger = OperatorLedger.beside(client.ledger)
    cursor = RedisCursor("uploads", ledger)
    assert cursor.load() == {}
    cursor.save({"listed_at": "now"})
    assert RedisCursor("uploads", ledger).load() == {"listed_at": "now"}
    assert 30 * 86400 < int(ledger.redis.ttl("blipq:watch:uploads")) <= 40 * 86400  # type: ignore[arg-type]


def test_a_cursor_file_that_is_something_else_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("my diary")
    with pytest.raises(InvalidRequest, match="cannot read"):
        FileCursor(tmp_path / "state.json").load()


def test_a_dry_run_leaves_the_cursor_alone(cursor: FileCursor) -> None:
    cursor.save({"listed_at": "then"})
    Unsaved(cursor).save({"listed_at": "now"})
    assert cursor.load() == {"listed_at": "then"}


def test_what_is_refused_is_looked_at_again_while_the_overlap_reaches_it(
    fake: FakeObjects, cursor: FileCursor
) -> None:
    """It may be let in meanwhile: rights are often given after the first upload."""
    source = listing(fake, cursor)
    taken(source)
    fake.there = {"a.jpg": NOW, "b.jpg": NOW}
    batch = source.next()
    assert batch is not None
    batch.done({found for found in batch.found if found.key == "a.jpg"})
    assert source.next() is None
    fake.now += timedelta(seconds=10)
    assert taken(source, done=True) == ["a.jpg"]
    assert taken(source) == []
    fake.there["c.jpg"] = fake.now
    for expected in (["c.jpg"], ["c.jpg"], ["c.jpg"], []):
        keys = []
        while (batch := source.next()) is not None:
            keys += [found.key for found in batch.found]
            batch.done(set(batch.found))
        assert keys == expected
        fake.now += timedelta(seconds=599)
