"""How long what is kept, where large results go, and how much one reply may hold."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import redis

from blipq import Client, JobInfo, JobNotFound, Options, Settings, Submission
from blipq.contract import CaptionRequest
from blipq.ledger import keys
from blipq.ledger.connection import connect
from blipq.ledger.worker import Claim, WorkerLedger
from blipq.s3.storage import Storage
from blipq.webhooks.delivery import body_of
from blipq.webhooks.outbox import Event, Outbox

REQUEST = CaptionRequest.model_validate({"image": "s3://uploads/cat.jpg"})
RESULT = json.dumps({"kind": "caption", "captions": [{"text": "a cat"}]})
LARGE = json.dumps({"kind": "caption", "captions": [{"text": "a" * 200_000}]})
ERROR = json.dumps({"code": "image_not_found", "message": "no such key"})
HOOK = {"url": "https://example.org/"}
REPLY = 4 * 2**20


def submitted(ledger: WorkerLedger, id: str = "job_1", **options: Any) -> Any:
    return ledger.submit(Submission(REQUEST, Options.model_validate(options), id), notify="test")


def ended(ledger: WorkerLedger, id: str = "job_1", result: str = RESULT, **options: Any) -> Claim:
    submitted(ledger, id, **options)
    claim = ledger.claim(id, "w1")
    assert isinstance(claim, Claim)
    assert ledger.succeed(claim, result, "{}")
    return claim


def read(ledger: WorkerLedger, id: str = "job_1") -> JobInfo:
    info = ledger.read(id)
    assert info is not None
    return info


def kept_s(raw: "redis.Redis", id: str = "job_1") -> float:
    return int(raw.pttl(keys.job(id))) / 1000


@pytest.fixture
def dropping(apart: Settings, raw_redis: "redis.Redis") -> WorkerLedger:
    """Records jobs that may do without their results once somebody else has them."""
    return WorkerLedger(raw_redis, apart.model_copy(update={"keep_delivered": False}))


@pytest.fixture
def settled(apart: Settings, raw_redis: "redis.Redis") -> Callable[..., Event]:
    """Sends the one event that is due, and records what came of it."""
    outbox, storage = Outbox(raw_redis, apart), Storage(apart)

    def settle(verdict: Any = "delivered") -> Event:
        (event,) = outbox.take(9, lease_s=60, most_of_a_host=9, room={})
        body = body_of(event.record, event.job or {}, storage)
        assert outbox.keep_body(event, body) == body
        assert outbox.settle(event, verdict, "delivered", "200")
        return event

    return settle


# --- how long a job is kept -----------------------------------------------------------------------


def test_a_job_is_kept_as_long_as_the_deployment_says(
    ledger: WorkerLedger, raw_redis: "redis.Redis"
) -> None:
    ended(ledger)
    assert kept_s(raw_redis) == pytest.approx(86400, abs=5)


def test_a_job_may_be_kept_for_less(ledger: WorkerLedger, raw_redis: "redis.Redis") -> None:
    ended(ledger, keep="10m")
    assert kept_s(raw_redis) == pytest.approx(600, abs=5)
    submitted(ledger, "job_2", keep="10m")
    claim = ledger.claim("job_2", "w1")
    assert isinstance(claim, Claim)
    ledger.fail(claim, ERROR, "{}")
    assert kept_s(raw_redis, "job_2") == pytest.approx(600, abs=5)


def test_a_job_is_not_kept_for_longer_than_the_deployment_says(
    ledger: WorkerLedger, raw_redis: "redis.Redis"
) -> None:
    ended(ledger, keep="20d")
    assert kept_s(raw_redis) == pytest.approx(86400, abs=5)


def test_an_open_job_outlives_the_time_that_it_is_kept_for(
    ledger: WorkerLedger, raw_redis: "redis.Redis"
) -> None:
    submitted(ledger, keep="1s", expires_in="1h")
    assert kept_s(raw_redis) > 3600


def test_a_key_is_free_when_its_job_is_kept_no_longer(
    ledger: WorkerLedger, raw_redis: "redis.Redis"
) -> None:
    ended(ledger, keep="1h", idempotency_key="k")
    assert submitted(ledger, "job_2", keep="1h", idempotency_key="k") == "job_1"
    raw_redis.delete(keys.job("job_1"))  # as its time to live does
    assert submitted(ledger, "job_2", keep="1h", idempotency_key="k").id == "job_2"


def test_a_delivered_webhook_keeps_a_job_no_longer_than_it_is_to_be(
    ledger: WorkerLedger, raw_redis: "redis.Redis", settled: Callable[..., Event]
) -> None:
    ended(ledger, keep="1h", webhook=HOOK)
    assert kept_s(raw_redis) > 86400  # its event waits
    settled()
    assert kept_s(raw_redis) == pytest.approx(3600, abs=5)


# --- results that somebody else has ---------------------------------------------------------------


def test_a_result_stays_by_default(
    ledger: WorkerLedger, client: Client, settled: Callable[..., Event]
) -> None:
    ended(ledger, webhook=HOOK, output="s3://blipq-outputs/1.json")
    settled()
    assert read(ledger).result is not None


def test_a_result_that_was_delivered_goes_and_its_status_and_key_stay(
    dropping: WorkerLedger, client: Client, settled: Callable[..., Event]
) -> None:
    ended(dropping, webhook=HOOK, idempotency_key="k")
    for _ in range(3):  # to read it is not to have it
        assert read(dropping).result is not None
        assert client.job("job_1").result(timeout=1)
    settled()
    info = read(dropping)
    assert (info.status, info.result) == ("succeeded", None)
    assert info.note == "the result was delivered by webhook, and is kept no longer"
    with pytest.raises(JobNotFound, match="succeeded: the result was delivered by webhook"):
        client.job("job_1").result(timeout=1)
    assert submitted(dropping, "job_2", webhook=HOOK, idempotency_key="k") == "job_1"


def test_a_result_that_could_not_be_delivered_stays(
    dropping: WorkerLedger, settled: Callable[..., Event]
) -> None:
    ended(dropping, webhook=HOOK)
    settled("dead")
    assert read(dropping).result is not None


def test_a_result_stays_where_the_webhook_had_no_room_for_it(
    dropping: WorkerLedger, settled: Callable[..., Event]
) -> None:
    ended(dropping, result=LARGE, webhook=HOOK)
    settled()
    assert read(dropping).result is not None


def test_the_webhook_of_another_event_delivers_no_result(
    dropping: WorkerLedger, settled: Callable[..., Event]
) -> None:
    ended(dropping, webhook={**HOOK, "events": ["job.running"]})
    settled()
    assert read(dropping).result is not None


@pytest.mark.parametrize("webhook", [None, HOOK])
def test_a_result_that_is_in_the_output_is_read_there(
    dropping: WorkerLedger, client: Client, settled: Callable[..., Event], webhook: Any
) -> None:
    output = f"s3://{client.settings.inbox_bucket}/answers/2.json"
    client.storage.put(output, RESULT.encode(), content_type="application/json")
    options = {"output": output} | ({"webhook": webhook} if webhook else {})
    claim = ended(dropping, **options)
    if webhook:
        assert read(dropping).result is not None  # the webhook has not carried it yet
        settled()
    info = read(dropping)
    assert (info.result, info.result_uri) == (None, output)
    assert client.job("job_1").result(timeout=1).text == "a cat"
    # A worker that has not heard the answer says it again.
    assert dropping.succeed(claim, RESULT, "{}")


def test_a_result_that_is_gone_from_s3_is_not_found(client: Client, ledger: WorkerLedger) -> None:
    submitted(ledger)
    claim = ledger.claim("job_1", "w1")
    assert isinstance(claim, Claim)
    uri = f"s3://{client.settings.inbox_bucket}/nothing.json"
    assert ledger.succeed(claim, LARGE, "{}", result_uri=uri)
    with pytest.raises(JobNotFound, match="its result is gone from"):
        client.job("job_1").result(timeout=1)
    client.storage.put(uri, b"{}", content_type="application/json")
    with pytest.raises(JobNotFound, match="is no result"):
        client.job("job_1").result(timeout=1)


def test_a_webhook_names_the_object_of_a_large_result(
    client: Client, ledger: WorkerLedger, settled: Callable[..., Event]
) -> None:
    submitted(ledger, webhook=HOOK)
    claim = ledger.claim("job_1", "w1")
    assert isinstance(claim, Claim)
    uri = f"s3://{client.settings.inbox_bucket}/results/1.json"
    client.storage.put(uri, RESULT.encode(), content_type="application/json")
    ledger.succeed(claim, RESULT, "{}", result_uri=uri)
    event = settled()
    told = json.loads(body_of(event.record, event.job or {}, client.storage))["data"]
    assert told["result_uri"] == uri
    assert told["result_url"].startswith("http")
    assert "result" not in told
    assert client.forget(["job_1"]).objects == [uri]


# --- replies --------------------------------------------------------------------------------------


def test_a_poll_holds_a_bounded_number_of_bytes_and_a_wait_gets_all(
    client: Client, ledger: WorkerLedger
) -> None:
    ids = [f"job_{n}" for n in range(60)]
    for id in ids:
        ended(ledger, id, LARGE)
    found = ledger.poll(ids, notify="test")
    size = sum(len(info.model_dump_json()) for info in found.ended.values())
    assert 0 < size < REPLY + 2 * len(LARGE)
    assert set(found.ended) | found.later == set(ids)
    assert found.later
    assert {info.id for info in client.outcomes(ids, timeout=20)} == set(ids)


def test_a_sender_takes_a_bounded_number_of_bytes(
    apart: Settings, ledger: WorkerLedger, raw_redis: "redis.Redis"
) -> None:
    for n in range(60):
        ended(ledger, f"job_{n}", LARGE, webhook=HOOK)
    outbox, taken = Outbox(raw_redis, apart), 0
    for _ in range(3):
        events = outbox.take(64, lease_s=60, most_of_a_host=64, room={})
        assert 0 < len(events) < 30
        taken += len(events)
    assert taken == 60


def test_one_result_larger_than_a_reply_still_arrives(
    client: Client, apart: Settings, ledger: WorkerLedger
) -> None:
    huge = json.dumps({"kind": "caption", "captions": [{"text": "a" * (REPLY + 1)}]})
    ended(ledger, "job_1", huge)
    ended(ledger, "job_2", huge)
    with connect(apart) as raw:
        assert raw.exists(keys.job("job_1"))
    found = {info.id for info in client.outcomes(["job_1", "job_2"], timeout=20)}
    assert found == {"job_1", "job_2"}


def test_a_living_worker_keeps_what_is_counted_of_open_jobs(
    ledger: WorkerLedger, raw_redis: "redis.Redis"
) -> None:
    """Submits look at these times rarely, or only where they make the key."""
    submitted(ledger)
    assert isinstance(ledger.claim("job_1", "w1"), Claim)
    names = (keys.OPEN, keys.work("default"), keys.working("default"))
    for name in names:
        assert raw_redis.pttl(name) > 40 * 86_400_000
        raw_redis.pexpire(name, 5_000)
    ledger.register("w1", ["default"], "{}", ttl_s=60, spare=False)
    ledger.reconcile()
    for name in names:
        assert raw_redis.pttl(name) > 40 * 86_400_000
