"""Lists of jobs by their indexes, on a real Redis: what is in them, in which order, how long."""

import time
from datetime import timedelta
from typing import Any

import pytest
import redis

from blipq import Options, Status, Submission
from blipq.contract import CaptionRequest, Kind, MatchRequest
from blipq.ledger.operator import OperatorLedger
from blipq.ledger.views import listing
from blipq.ledger.views.listing import HOUR_MS, Listing, ListName, Place, Wanted
from blipq.ledger.worker import Claim, WorkerLedger

CAPTION = CaptionRequest.model_validate({"image": "s3://photos/cat.jpg"})
MATCH = MatchRequest.model_validate({"image": "s3://photos/cat.jpg", "texts": ["a cat"]})
RESULT = '{"kind": "caption", "captions": [{"text": "a cat"}]}'


@pytest.fixture
def lists(ledger: WorkerLedger) -> Listing:
    return Listing.beside(ledger)


def submit(
    ledger: WorkerLedger,
    id: str,
    request: Any = CAPTION,
    tenant: str | None = None,
    **options: Any,
) -> str:
    ledger.submit(Submission(request, Options(**options), id, tenant), notify="test")
    return id


def claim(ledger: WorkerLedger, id: str) -> Claim:
    claimed = ledger.claim(id, "w1")
    assert isinstance(claimed, Claim)
    return claimed


def finish(ledger: WorkerLedger, id: str) -> None:
    assert ledger.succeed(claim(ledger, id), RESULT, "{}")


def ids_of(lists: Listing, *, limit: int = 100, **wanted: Any) -> list[str]:
    """All ids, page by page."""
    found: list[str] = []
    after: Place | None = None
    while True:
        page = lists.page(Wanted(**wanted), limit=limit, after=after)
        assert len(page.jobs) <= limit
        found += [info.id for info in page.jobs]
        if page.next is None:
            return found
        assert after is None or page.next < after, "a page after a page leads on"
        after = page.next


def move(raw: "redis.Redis", id: str, hours: int) -> None:
    """Has a job submitted so many hours earlier."""
    (text,) = (name for name in raw.zrange("blipq:lists", 0, -1) if is_in(raw, name, id))
    hour, rest = text.split(":", 1)
    created_at = int(raw.hget(f"blipq:job:{id}", "created_at") or 0) - hours * HOUR_MS
    raw.hset(f"blipq:job:{id}", "created_at", created_at)
    raw.zrem(f"blipq:listed:{text}", id)
    earlier = f"{int(hour) - hours}:{rest}"
    raw.zadd(f"blipq:listed:{earlier}", {id: created_at})
    raw.expire(f"blipq:listed:{earlier}", 3600)
    raw.zadd("blipq:lists", {earlier: int(hour) - hours})


def is_in(raw: "redis.Redis", name: str, id: str) -> bool:
    return raw.zscore(f"blipq:listed:{name}", id) is not None


def test_jobs_are_listed_by_status_kind_model_tenant_and_time(
    ledger: WorkerLedger, lists: Listing
) -> None:
    submit(ledger, "job_a")
    submit(ledger, "job_b", MATCH, "shop")
    submit(ledger, "job_c", CAPTION, "shop", model="m")
    submit(ledger, "job_d", CAPTION, "other", idempotency_key="order-1")
    submit(ledger, "job_e")
    claim(ledger, "job_a")
    finish(ledger, "job_d")
    ledger.cancel("job_e")
    assert sorted(ids_of(lists)) == ["job_a", "job_b", "job_c", "job_d", "job_e"]
    assert ids_of(lists, status=Status.RUNNING) == ["job_a"]
    assert sorted(ids_of(lists, status=Status.QUEUED)) == ["job_b", "job_c"]
    assert ids_of(lists, status=Status.SUCCEEDED) == ["job_d"]
    assert ids_of(lists, status=Status.CANCELLED) == ["job_e"]
    assert ids_of(lists, kind=Kind.MATCH) == ["job_b"]
    assert ids_of(lists, model="m") == ["job_c"]
    assert sorted(ids_of(lists, tenant="shop")) == ["job_b", "job_c"]
    assert ids_of(lists, tenant="shop", kind=Kind.CAPTION) == ["job_c"]
    assert sorted(ids_of(lists, tenant="")) == ["job_a", "job_e"]
    assert ids_of(lists, tenant="other", status=Status.QUEUED) == []
    info = ledger.read("job_b")
    assert info is not None
    day = timedelta(days=1)
    assert ids_of(lists, kind=Kind.MATCH, since=info.created_at) == ["job_b"]
    assert ids_of(lists, kind=Kind.MATCH, until=info.created_at) == []
    assert ids_of(lists, since=info.created_at + day) == ids_of(lists, until=info.created_at - day)


@pytest.mark.parametrize("limit", [1, 7, 500])
def test_pages_hold_each_job_once_in_order_also_of_one_millisecond(
    ledger: WorkerLedger, lists: Listing, raw_redis: "redis.Redis", limit: int
) -> None:
    """Jobs that were submitted together have the same time."""
    kinds = (CAPTION, MATCH)
    submissions = [Submission(kinds[n % 2], Options(), f"job_{n:03}") for n in range(60)]
    ledger.submit_all([ledger.prepare(each, notify="test") for each in submissions])
    for n in range(0, 60, 3):
        finish(ledger, f"job_{n:03}")
    for n in range(10):
        move(raw_redis, f"job_{n:03}", 1 + n % 3 * 30)
    expected = [f"job_{n:03}" for n in reversed(range(10, 60))]
    expected += [f"job_{n:03}" for rest in range(3) for n in reversed(range(10)) if n % 3 == rest]
    assert ids_of(lists, limit=limit) == expected
    since = ledger.read("job_002")
    assert since is not None
    assert ids_of(lists, limit=limit, until=since.created_at) == []
    assert ids_of(lists, limit=limit, since=since.created_at) == expected


def test_a_page_by_metadata_says_how_far_it_has_looked(
    ledger: WorkerLedger, lists: Listing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "MOST_READ", 20)
    submit(ledger, "job_first", metadata={"order": "42"})
    for n in range(45):
        submit(ledger, f"job_{n}", metadata={"order": str(n % 2)})
    wanted = Wanted(metadata={"order": "42"})
    page = lists.page(wanted, limit=10)
    assert (page.jobs, page.read) == ([], 20)
    assert page.next is not None
    page = lists.page(wanted, limit=10, after=page.next)
    assert (page.jobs, page.read) == ([], 20)
    page = lists.page(wanted, limit=10, after=page.next)
    assert ([info.id for info in page.jobs], page.next, page.read) == (["job_first"], None, 6)


def test_many_lists_without_a_match_end_a_page_and_not_the_list(
    ledger: WorkerLedger,
    lists: Listing,
    raw_redis: "redis.Redis",
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(listing, "MOST_LISTS", 5)
    submit(ledger, "job_old", tenant="shop")
    move(raw_redis, "job_old", 20)
    for hours in range(12):
        submit(ledger, f"job_{hours}")
        move(raw_redis, f"job_{hours}", hours)
    page = lists.page(Wanted(tenant="shop"), limit=10)
    assert (page.jobs, page.read) == ([], 0)
    assert page.next is not None
    assert ids_of(lists, tenant="shop") == ["job_old"]


def test_a_job_that_ends_while_its_page_is_read_is_in_it_once(
    ledger: WorkerLedger, lists: Listing, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(5):
        submit(ledger, f"job_{n}")
    read = Listing.members

    def members(self: Listing, names: Any, *rest: Any) -> Any:
        first, *others = names
        found = read(self, [first], *rest)
        ledger.cancel("job_3")
        return found + (read(self, others, *rest) if others else [])

    ledger.cancel("job_4")
    monkeypatch.setattr(Listing, "members", members)
    page = lists.page(Wanted(), limit=10)
    assert sorted(info.id for info in page.jobs) == [f"job_{n}" for n in range(5)]


def test_a_dead_letter_is_listed_as_failed_until_it_is_queued_again(
    ledger: WorkerLedger, lists: Listing, raw_redis: "redis.Redis"
) -> None:
    error = '{"code": "internal", "message": "no", "retryable": true}'
    assert ledger.fail(claim(ledger, submit(ledger, "job_1")), error, "{}", dead=True)
    assert ids_of(lists, status=Status.FAILED) == ["job_1"]
    (name,) = raw_redis.scan_iter("blipq:listed:*:failed")
    assert raw_redis.pttl(name) >= raw_redis.pttl("blipq:job:job_1")
    assert OperatorLedger.beside(ledger).retry_dead_letter("job_1")
    assert ids_of(lists, status=Status.FAILED) == []
    assert ids_of(lists, status=Status.QUEUED) == ids_of(lists) == ["job_1"]


def test_a_message_that_cannot_be_run_is_listed_as_failed(
    ledger: WorkerLedger, lists: Listing
) -> None:
    error = '{"code": "invalid_request", "message": "no", "retryable": false}'
    assert ledger.refuse("job_1", Kind.CAPTION, error)
    assert ids_of(lists, status=Status.FAILED, kind=Kind.CAPTION, model="default") == ["job_1"]


def test_a_job_that_expires_is_listed_as_that(ledger: WorkerLedger, lists: Listing) -> None:
    submit(ledger, "job_1", expires_in=0.001)
    time.sleep(0.01)
    (info,) = lists.page(Wanted(), limit=1).jobs
    assert info.status is Status.EXPIRED
    assert ids_of(lists, status=Status.EXPIRED) == ["job_1"]


def test_lists_go_with_their_records_and_their_names_with_them(
    ledger: WorkerLedger, lists: Listing, raw_redis: "redis.Redis"
) -> None:
    for n in range(3):
        finish(ledger, submit(ledger, f"job_{n}"))
    (name,) = raw_redis.scan_iter("blipq:listed:*")
    kept = raw_redis.pttl("blipq:job:job_2")
    assert kept <= raw_redis.pttl(name) <= kept + HOUR_MS
    assert raw_redis.pttl("blipq:lists") >= raw_redis.pttl(name)
    assert ledger.release(["job_0", "job_1"]) == 2
    assert raw_redis.zrange(name, 0, -1) == ["job_2"]
    gone = [ListName(n, "", "m", "caption", "open") for n in range(15)]
    raw_redis.zadd("blipq:lists", {each.key.removeprefix("blipq:listed:"): 1 for each in gone})
    submit(ledger, "job_3", MATCH)
    assert raw_redis.zcard("blipq:lists") == 15 - 10 + 3
    finish(ledger, "job_3")
    names = raw_redis.zrange("blipq:lists", 0, -1)
    assert len(names) == 2
    assert all(ListName.of(each).hour > 15 for each in names)


def test_a_list_holds_no_results(ledger: WorkerLedger, lists: Listing) -> None:
    finish(ledger, submit(ledger, "job_1", metadata={"order": "42"}))
    (info,) = lists.page(Wanted(), limit=1).jobs
    assert (info.result, info.metadata) == (None, {"order": "42"})
    (info,) = OperatorLedger.beside(ledger).jobs()
    assert info.result is not None


def test_an_hour_with_many_lists_is_merged_by_time(ledger: WorkerLedger, lists: Listing) -> None:
    ids = [submit(ledger, f"job_{n:03}", tenant=f"t{n * 7 % 40}") for n in range(120)]
    found = ids_of(lists, limit=50)
    assert sorted(found) == ids
    infos = lists.page(Wanted(), limit=120).jobs
    times = [(info.created_at, info.id) for info in infos]
    assert times == sorted(times, reverse=True)
