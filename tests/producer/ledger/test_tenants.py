"""Tenants' open jobs and rates: what counts, what is refused, on a real Redis."""

import json
import time
from collections.abc import Callable, Iterator

import pytest
import redis
from typer.testing import CliRunner

from blipq import (
    Client,
    InvalidRequest,
    JobFilter,
    Options,
    QueueFull,
    Settings,
    Submission,
    SubmitStopped,
    TenantLimited,
)
from blipq.cli import app
from blipq.contract import CaptionRequest
from blipq.ledger import keys
from blipq.ledger.changes import CHUNK
from blipq.ledger.connection import connect
from blipq.ledger.operator import OperatorLedger
from blipq.ledger.views.actions import ActionLog
from blipq.ledger.worker import MAX_CRASHES, Claim, WorkerLedger

REQUEST = CaptionRequest.model_validate({"image": "s3://uploads/cat.jpg"})
QUEUE = "blipq.default.normal"
RESULT = json.dumps({"kind": "caption", "captions": [{"text": "a cat"}]})
ERROR = json.dumps({"code": "image_not_found", "message": "no such key"})


@pytest.fixture
def raw(apart: Settings) -> Iterator["redis.Redis"]:
    with connect(apart) as raw:
        yield raw


@pytest.fixture
def ledger(raw: "redis.Redis", apart: Settings) -> WorkerLedger:
    return WorkerLedger(raw, apart)


@pytest.fixture
def client(apart: Settings) -> Iterator[Client]:
    with Client(apart) as client:
        yield client


def submit(ledger: WorkerLedger, id: str, tenant: str | None = "shop", **options: object) -> None:
    given = Options.model_validate(options)
    ledger.submit(Submission(REQUEST, given, id, tenant), notify="test")


def claimed(ledger: WorkerLedger, id: str, lease_s: float = 30.0) -> Claim:
    claim = ledger.claim(id, "w1", lease_s=lease_s)
    assert isinstance(claim, Claim), claim
    return claim


def counts(ledger: WorkerLedger) -> dict[str, int]:
    """Open jobs by tenant."""
    return {each.tenant: each.open for each in OperatorLedger.beside(ledger).tenants()}


def test_a_tenant_with_its_open_jobs_is_refused_and_no_other_is(
    ledger: WorkerLedger, client: Client
) -> None:
    client.limit("shop", open_jobs=2)
    submit(ledger, "job_1")
    submit(ledger, "job_2")
    with pytest.raises(TenantLimited, match="'shop' may have 2 open jobs") as refused:
        submit(ledger, "job_3")
    assert isinstance(refused.value, QueueFull)
    found = refused.value.tenant, refused.value.limit, refused.value.most
    assert found == ("shop", "open_jobs", 2)
    assert ledger.read("job_3") is None
    for number in range(5):
        submit(ledger, f"job_zoo{number}", "zoo")
        submit(ledger, f"job_{number}_of_nobody", None)
    ledger.cancel("job_1")
    submit(ledger, "job_3")


def killed(ledger: WorkerLedger, id: str) -> None:
    """Its workers die until it is out of attempts."""
    for _ in range(MAX_CRASHES):
        claim = claimed(ledger, id, lease_s=0.001)
        if claim.solo:
            ledger.begin(claim)
        time.sleep(0.005)
        ledger.reconcile()


def erased(ledger: WorkerLedger, id: str) -> None:
    ledger.forget([id], erase=False)
    ledger.forget([id], erase=True)


def expired(ledger: WorkerLedger, id: str) -> None:
    """Its deadline has passed, and only the sweep sees it."""
    ledger.redis.zadd(keys.OPEN, {id: 1})
    ledger.redis.hset(keys.job(id), "deadline", 1)
    ledger.reconcile()


ENDS: dict[str, Callable[[WorkerLedger, str], object]] = {
    "succeeds": lambda ledger, id: ledger.succeed(claimed(ledger, id), RESULT, "{}"),
    "fails": lambda ledger, id: ledger.fail(claimed(ledger, id), ERROR, "{}"),
    "is cancelled": lambda ledger, id: ledger.cancel(id),
    "is cancelled as it runs": lambda ledger, id: (claimed(ledger, id), ledger.cancel(id)),
    "expires": expired,
    "kills its workers": killed,
    "is erased": erased,
    "is erased without being closed": lambda ledger, id: ledger.forget([id], erase=True),
    "is purged": lambda ledger, id: OperatorLedger.beside(ledger).purge(QUEUE),
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS.keys())
def test_a_job_counts_until_it_ends_however_it_ends(
    ledger: WorkerLedger, client: Client, end: Callable[[WorkerLedger, str], object]
) -> None:
    client.limit("shop", open_jobs=1)
    submit(ledger, "job_1")
    assert counts(ledger) == {"shop": 1}
    end(ledger, "job_1")
    assert counts(ledger) == {"shop": 0}
    submit(ledger, "job_2")


def test_a_job_counts_once_however_often_it_is_submitted_claimed_and_given_back(
    ledger: WorkerLedger, client: Client
) -> None:
    client.limit("shop", open_jobs=1, rate=0.5)
    for _ in range(3):
        submit(ledger, "job_1", idempotency_key="k")
        submit(ledger, "job_again", idempotency_key="k")  # the same job under its key
    ledger.hand_back(claimed(ledger, "job_1"))
    ledger.retry(claimed(ledger, "job_1"), 0.001)
    time.sleep(0.005)
    ledger.reconcile()
    claimed(ledger, "job_1", lease_s=0.001)
    time.sleep(0.005)
    assert [each.id for each in ledger.reconcile().messages] == ["job_1"]
    submit(ledger, "job_1", idempotency_key="k")
    assert counts(ledger) == {"shop": 1}


def test_a_job_that_is_tried_again_counts_and_is_refused_at_the_limit(
    ledger: WorkerLedger, client: Client
) -> None:
    for id, tenant in (("job_1", "shop"), ("job_2", "shop"), ("job_3", "zoo")):
        submit(ledger, id, tenant)
        ledger.fail(claimed(ledger, id), ERROR, "{}")
    client.limit("shop", open_jobs=1)
    with pytest.raises(TenantLimited, match=r"'shop' may have 1 open jobs .*: 2 are queued again"):
        client.retry_all(["job_1", "job_2", "job_3"])
    assert counts(ledger) == {"shop": 1, "zoo": 1}
    with pytest.raises(TenantLimited):
        submit(ledger, "job_4")
    ledger.succeed(claimed(ledger, "job_1"), RESULT, "{}")
    assert client.retry_all(JobFilter(tenant="shop")) == 1


@pytest.mark.parametrize("which", ["ids", "filter"])
def test_a_tenant_at_its_limit_holds_up_no_other_tenants_retries(
    ledger: WorkerLedger, client: Client, which: str
) -> None:
    ids = [f"job_{number}" for number in range(2 * CHUNK)]
    for number, id in enumerate(ids):
        submit(ledger, id, "zoo" if number % 2 else "shop")
    client.cancel_all(ids)
    client.limit("shop", open_jobs=1)
    of = ids if which == "ids" else JobFilter(status="cancelled")
    with pytest.raises(TenantLimited, match=rf"'shop' .*: {CHUNK + 1} are queued again"):
        client.retry_all(of)
    assert counts(ledger) == {"shop": 1, "zoo": CHUNK}


def test_a_tenant_at_its_limit_holds_up_no_other_tenants_dead_letters(
    ledger: WorkerLedger, client: Client, apart: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for id, tenant in (("job_1", "shop"), ("job_2", "zoo")):
        submit(ledger, id, tenant)
        ledger.fail(claimed(ledger, id), ERROR, "{}", dead=True)
    client.limit("shop", open_jobs=0)
    monkeypatch.setenv("BLIPQ_REDIS_URL", apart.redis_url)
    ran = CliRunner().invoke(app, ["dead-letters", "retry", "job_1", "job_2"])
    assert ran.stdout == "job_2: queued\n"
    assert ran.exit_code != 0
    assert "'shop' may have 0 open jobs" in ran.stderr
    assert "not queued again are job_1" in ran.stderr
    assert counts(ledger)["zoo"] == 1


def test_a_rate_lets_two_seconds_jobs_come_at_once_and_then_so_many_a_second(
    ledger: WorkerLedger, client: Client
) -> None:
    client.limit("shop", rate=50)
    accepted, refused = 0, []
    until = time.monotonic() + 1
    while time.monotonic() < until:
        try:
            submit(ledger, f"job_{accepted}")
            accepted += 1
        except TenantLimited as error:
            refused.append(error)
            time.sleep(error.retry_after_s)
    took = time.monotonic() - until + 1
    assert 100 <= accepted <= 100 + 50 * took + 1
    assert accepted == counts(ledger)["shop"]
    assert (refused[0].limit, refused[0].most) == ("rate", 50)
    assert all(0 < each.retry_after_s <= 0.021 for each in refused)
    submit(ledger, "job_0")  # it is known


def test_a_rate_below_one_a_second_lets_one_come_at_once(
    ledger: WorkerLedger, client: Client
) -> None:
    client.limit("shop", rate=0.1)
    submit(ledger, "job_1")
    with pytest.raises(TenantLimited, match=r"may submit 0\.1 jobs a second") as refused:
        submit(ledger, "job_2")
    assert 9 < refused.value.retry_after_s <= 10


def test_a_rate_that_is_raised_holds_at_once(ledger: WorkerLedger, client: Client) -> None:
    client.limit("shop", rate=0.01)
    submit(ledger, "job_1")
    client.limit("shop", rate=0.2)
    submit(ledger, "job_2")
    with pytest.raises(TenantLimited) as refused:
        submit(ledger, "job_3")
    assert 4 < refused.value.retry_after_s <= 5


def test_a_clock_that_is_set_back_locks_no_tenant_out(
    ledger: WorkerLedger, client: Client, raw: "redis.Redis"
) -> None:
    client.limit("shop", rate=0.2)
    raw.set(keys.rate("shop"), 1000 * (time.time() + 3600), px=3_600_000)
    submit(ledger, "job_1")
    with pytest.raises(TenantLimited) as refused:
        submit(ledger, "job_2")
    assert 4 < refused.value.retry_after_s <= 5


def test_a_limit_of_all_others_is_for_those_without_one_of_their_own(
    ledger: WorkerLedger, client: Client
) -> None:
    client.limit("*", open_jobs=1)
    client.limit("shop", open_jobs=2)
    for number in range(2):
        submit(ledger, f"job_{number}")
        submit(ledger, f"job_{number}_of_nobody", None)
    submit(ledger, "job_zoo", "zoo")
    for tenant in ("shop", "zoo"):
        with pytest.raises(TenantLimited):
            submit(ledger, "job_more", tenant)
    client.limit("shop")
    with pytest.raises(TenantLimited, match="1 open jobs"):
        submit(ledger, "job_more")
    client.limit("*")
    submit(ledger, "job_more")


def test_none_of_a_tenants_jobs_are_taken_where_it_may_have_none(
    ledger: WorkerLedger, client: Client
) -> None:
    client.limit("shop", open_jobs=0)
    with pytest.raises(TenantLimited, match="0 open jobs"):
        submit(ledger, "job_1")


def test_many_jobs_stop_at_the_limit_and_say_what_is_recorded(client: Client) -> None:
    client.limit("shop", open_jobs=3)
    with pytest.raises(SubmitStopped) as stopped:
        client.submit_many([REQUEST] * 5, tenant="shop")
    assert (stopped.value.index, len(stopped.value.pending)) == (3, 2)
    assert stopped.value.retryable
    assert isinstance(stopped.value.__cause__, TenantLimited)
    assert {each.tenant for each in stopped.value.pending} == {"shop"}


def test_what_a_worker_of_an_earlier_version_ended_is_counted_until_the_next_sweep(
    ledger: WorkerLedger, client: Client, raw: "redis.Redis"
) -> None:
    client.limit("shop", open_jobs=2)
    for id in ("job_1", "job_2"):
        submit(ledger, id)
    raw.hset(keys.job("job_1"), "status", "succeeded")  # as its ``end_job`` did
    raw.zrem(keys.OPEN, "job_1")
    raw.zrem(keys.queued(QUEUE), "job_1")
    with pytest.raises(TenantLimited):
        submit(ledger, "job_3")
    ledger.reconcile()
    assert counts(ledger) == {"shop": 1}
    submit(ledger, "job_3")


def test_a_tenant_without_open_jobs_is_listed_no_more_after_a_sweep(
    ledger: WorkerLedger, raw: "redis.Redis"
) -> None:
    submit(ledger, "job_1")
    submit(ledger, "job_2", "zoo")
    ledger.cancel("job_1")
    assert counts(ledger) == {"zoo": 1}
    ledger.reconcile()
    assert raw.zrange(keys.TENANTS, 0, -1) == ["zoo"]


def test_limits_are_kept_while_a_worker_lives(
    ledger: WorkerLedger, client: Client, raw: "redis.Redis"
) -> None:
    client.limit("shop", open_jobs=2)
    raw.expire(keys.LIMITS, 60)
    ledger.reconcile()
    assert raw.ttl(keys.LIMITS) > 40 * 86400


@pytest.mark.parametrize("tenant", ["", "a:b", "a b", "*", "x" * 65, "a\n"])
def test_a_tenant_whose_name_is_none_is_refused(client: Client, tenant: str) -> None:
    with pytest.raises(InvalidRequest, match="tenant: "):
        client.caption("s3://uploads/cat.jpg", tenant=tenant)
    with pytest.raises(InvalidRequest, match="tenant: "):
        client.submit(REQUEST, tenant=tenant)


@pytest.mark.parametrize(
    ("tenant", "limits", "wrong"),
    [
        ("a:b", {"open_jobs": 1}, "tenant: 'a:b'"),
        ("shop", {"open_jobs": -1}, "open_jobs: "),
        ("shop", {"rate": 0}, "rate: "),
        ("shop", {"rate": float("nan")}, "rate: "),
        ("shop", {"rate": float("inf")}, "rate: "),
    ],
)
def test_limits_that_are_none_are_refused(
    client: Client, tenant: str, limits: dict[str, float], wrong: str
) -> None:
    with pytest.raises(InvalidRequest, match=wrong):
        client.limit(tenant, **limits)  # type: ignore[arg-type]


def test_who_limited_whom_is_in_the_log_of_actions(client: Client) -> None:
    client.limit("shop", open_jobs=2)
    (action,) = ActionLog.beside(client.ledger).latest(5)
    assert (action.action, action.target, action.count) == (
        "limit",
        "shop: 2 open jobs, any number of jobs a second",
        1,
    )
