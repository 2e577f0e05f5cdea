"""Pausing, and changes of many jobs, on a real Redis: what clients alone do not show."""

import json
import time

import pytest
import redis

from blipq import (
    Client,
    JobFilter,
    Options,
    Priority,
    QueueFull,
    Settings,
    Submission,
    UnknownModel,
    Webhook,
)
from blipq.contract import CaptionRequest, Kind
from blipq.ledger import keys
from blipq.ledger.changes import CHUNK, Change, Changed, Changing
from blipq.ledger.operator import OperatorLedger
from blipq.ledger.worker import Claim, Turn, WorkerLedger

IMAGE = "s3://uploads/cat.jpg"
REQUEST = CaptionRequest.model_validate({"image": IMAGE})
QUEUE = "blipq.default.normal"
RESULT = json.dumps({"kind": "caption", "captions": [{"text": "a cat"}]})
ERROR = json.dumps({"code": "image_not_found", "message": "no such key"})


def submitted(ledger: WorkerLedger, id: str, **options: object) -> None:
    ledger.submit(Submission(REQUEST, Options.model_validate(options), id), notify="test")


def claimed(ledger: WorkerLedger, id: str) -> Claim:
    claim = ledger.claim(id, "w1")
    assert isinstance(claim, Claim), claim
    return claim


# --- pause ----------------------------------------------------------------------------------------


def test_a_job_of_a_paused_queue_is_not_claimed_and_waits_on(ledger: WorkerLedger) -> None:
    submitted(ledger, "job_1")
    ledger.pause(QUEUE)
    assert ledger.claim("job_1", "w1") == "paused"
    info = ledger.read("job_1")
    assert info is not None
    assert (info.status, info.attempts) == ("queued", 0)
    ledger.resume(QUEUE)
    claimed(ledger, "job_1")


def test_a_status_says_that_the_queue_is_paused(ledger: WorkerLedger) -> None:
    submitted(ledger, "job_1")
    ledger.pause(QUEUE)
    ledger.register("w1", ["default"], "{}", ttl_s=60, spare=False)
    info = ledger.read("job_1")
    assert info is not None
    assert info.note == f"the queue {QUEUE} is paused"


def test_a_job_that_runs_ends_although_its_queue_is_paused(ledger: WorkerLedger) -> None:
    submitted(ledger, "job_1")
    claim = claimed(ledger, "job_1")
    ledger.pause(QUEUE)
    assert ledger.renew({"job_1": claim.token}) == []
    assert ledger.succeed(claim, RESULT, "{}")


def test_nothing_of_a_paused_queue_is_published_again(ledger: WorkerLedger) -> None:
    """A worker with room for a whole grace would else have its lost messages sent."""
    submitted(ledger, "job_1")
    ledger.register("w1", ["default"], "{}", ttl_s=60, spare=True)
    ledger.pause(QUEUE)
    assert ledger.reconcile(grace_s=0.001).messages == []
    ledger.resume(QUEUE)
    time.sleep(0.01)  # the ledger counts in milliseconds
    assert [each.id for each in ledger.reconcile(grace_s=60).messages] == ["job_1"]
    assert ledger.reconcile(grace_s=60).messages == []  # once, and not for ever


def test_a_list_that_is_none_holds_up_its_own_queue_alone(
    ledger: WorkerLedger, raw_redis: "redis.Redis"
) -> None:
    submitted(ledger, "job_1")
    submitted(ledger, "job_2", priority="low")
    ledger.register("w1", ["default"], "{}", ttl_s=60, spare=True)
    raw_redis.set(QUEUE, "no list")
    time.sleep(0.01)  # the ledger counts in milliseconds
    assert [each.id for each in ledger.reconcile(grace_s=0.001).messages] == ["job_2"]
    raw_redis.delete(QUEUE)
    time.sleep(0.01)
    assert "job_1" in [each.id for each in ledger.reconcile(grace_s=0.001).messages]


def test_what_is_resumed_is_published_again_as_far_as_the_broker_lacks_it(
    ledger: WorkerLedger, raw_redis: "redis.Redis"
) -> None:
    for n in range(5):
        submitted(ledger, f"job_{n}")
    raw_redis.rpush(QUEUE, "a", "b", "c")
    try:
        ledger.pause(QUEUE)
        ledger.resume(QUEUE)
        turn = Turn("w1", ttl_s=5, patience_s=0)
        assert len(ledger.reconcile(grace_s=60, turn=turn).messages) == 2
    finally:
        raw_redis.delete(QUEUE)


def test_to_resume_a_queue_that_runs_changes_nothing(
    ledger: WorkerLedger, raw_redis: "redis.Redis"
) -> None:
    submitted(ledger, "job_1")
    ledger.resume(QUEUE)
    assert not raw_redis.exists(keys.paused(QUEUE))
    assert ledger.reconcile(grace_s=60).messages == []


def test_a_sweep_keeps_a_pause_alive(ledger: WorkerLedger, raw_redis: "redis.Redis") -> None:
    submitted(ledger, "job_1")
    ledger.pause(QUEUE)
    raw_redis.pexpire(keys.paused(QUEUE), 5000)
    ledger.reconcile()
    assert raw_redis.ttl(keys.paused(QUEUE)) > 39 * 86400


def test_a_queue_of_a_model_that_nobody_knows_is_not_paused(ledger: WorkerLedger) -> None:
    with pytest.raises(UnknownModel, match="no worker has served 'typo'"):
        ledger.pause("blipq.typo.low")


def test_a_paused_queue_is_listed_before_a_job_comes(client: Client) -> None:
    client.pause("blipq.m.low")
    (state,) = OperatorLedger.beside(client.ledger).queues()
    assert (state.queue, state.waiting, state.paused) == ("blipq.m.low", 0, True)


# --- many jobs ------------------------------------------------------------------------------------


def test_every_job_is_found_among_more_than_one_script_goes_through(
    client: Client, raw_redis: "redis.Redis"
) -> None:
    count = 3 * CHUNK
    client.submit_many([REQUEST] * count, Options(model="m", metadata={"batch": "1"}))
    client.submit_many([REQUEST] * 10, Options(model="m"))
    assert client.expedite(JobFilter(metadata={"batch": "1"}), "low") == count
    assert raw_redis.zcard(keys.queued("blipq.m.low")) == count
    assert raw_redis.llen("blipq.m.low") == count
    assert client.cancel_all(JobFilter(priority="low"), dry_run=True) == count
    assert client.cancel_all(JobFilter(priority="low")) == count
    assert raw_redis.zcard(keys.OPEN) == 10


def test_one_script_takes_a_bounded_number_of_ids() -> None:
    changing = Changing(Change.of("cancel", [f"job_{n}" for n in range(2 * CHUNK + 1)]))
    sizes = []
    while (chunk := changing.next()) is not None:
        sizes.append(len(chunk.ids))
        changing.took(Changed([]))
    assert sizes == [CHUNK, CHUNK, 1]


def test_a_job_that_waits_for_a_retry_moves_and_goes_on_to_wait(
    ledger: WorkerLedger, client: Client, raw_redis: "redis.Redis"
) -> None:
    submitted(ledger, "job_1")
    ledger.retry(claimed(ledger, "job_1"), 60)
    assert client.expedite(["job_1"]) == 1
    assert raw_redis.zcard(keys.DELAYED) == 1
    raw_redis.zadd(keys.DELAYED, {"job_1": 0})
    (message,) = ledger.reconcile().messages
    assert message.queue == "blipq.default.high"


def test_a_moved_job_makes_no_other_of_its_new_queue_look_lost(ledger: WorkerLedger) -> None:
    """The message that was claimed may be that of its former queue."""
    submitted(ledger, "job_1", priority="low")
    time.sleep(0.02)
    submitted(ledger, "job_2")
    move = Changing(Change.of("move", ["job_2"], priority=Priority.LOW)).next()
    assert move is not None
    assert ledger.change(move).ids == ["job_2"]
    claimed(ledger, "job_2")
    assert ledger.reconcile(grace_s=0.005).messages == []


def test_a_job_that_runs_is_not_moved(ledger: WorkerLedger, client: Client) -> None:
    submitted(ledger, "job_1")
    claimed(ledger, "job_1")
    assert client.expedite(["job_1"]) == 0


def test_a_message_that_was_refused_is_in_no_queue_and_stops_no_change(
    ledger: WorkerLedger, client: Client
) -> None:
    """Its record has no queue. In a list of ids it stands among jobs that wait."""
    ledger.refuse("refused", Kind.CAPTION, ERROR)
    submitted(ledger, "job_1")
    assert client.expedite(["refused", "job_1"]) == 1
    assert client.expedite(JobFilter(model="default"), Priority.LOW) == 1
    assert client.cancel_all(["refused", "job_1"]) == 1
    assert client.retry_all(["refused", "job_1"]) == 1


def test_a_moved_job_is_the_same_job_for_who_submits_it_again(
    ledger: WorkerLedger, client: Client
) -> None:
    submitted(ledger, "job_1", idempotency_key="k")
    client.expedite(["job_1"])
    again = Submission(REQUEST, Options(idempotency_key="k"), "job_2")
    assert ledger.submit(again, notify="test") == "job_1"


def test_a_job_that_is_tried_again_keeps_its_idempotency_key(
    ledger: WorkerLedger, client: Client, raw_redis: "redis.Redis"
) -> None:
    submitted(ledger, "job_1", idempotency_key="k")
    ledger.fail(claimed(ledger, "job_1"), ERROR, "{}")
    raw_redis.expire(keys.idempotency("k"), 5)
    assert client.retry_all(["job_1"]) == 1
    assert raw_redis.ttl(keys.idempotency("k")) > 86400


def test_a_job_of_a_tenant_that_is_tried_again_keeps_its_key_and_is_found_by_its_tenant(
    ledger: WorkerLedger, client: Client, raw_redis: "redis.Redis"
) -> None:
    for tenant in ("shop", "zoo"):
        job = Submission(REQUEST, Options(idempotency_key="k"), f"job_{tenant}", tenant)
        ledger.submit(job, notify="test")
        ledger.fail(claimed(ledger, job.id), ERROR, "{}")
        raw_redis.expire(keys.idempotency(f"{tenant}:k"), 5)
    assert client.retry_all(JobFilter(tenant="shop")) == 1
    assert raw_redis.ttl(keys.idempotency("shop:k")) > 86400
    assert raw_redis.ttl(keys.idempotency("zoo:k")) <= 5


def test_each_end_of_a_job_that_is_tried_again_has_an_event_of_its_own(
    ledger: WorkerLedger, client: Client, raw_redis: "redis.Redis"
) -> None:
    submitted(ledger, "job_1", webhook=Webhook(url="https://example.org/"))
    ledger.fail(claimed(ledger, "job_1"), ERROR, "{}")
    client.retry_all(["job_1"])
    ledger.succeed(claimed(ledger, "job_1"), RESULT, "{}")
    events = raw_redis.zrange(keys.outbox("example.org"), 0, -1)
    assert sorted(events) == ["job_1/job.failed", "job_1/job.succeeded/1"]
    told = raw_redis.hget(keys.event("job_1/job.failed"), "job")
    assert json.loads(str(told))["status"] == "failed"


def test_a_job_that_is_tried_again_has_no_losses_of_its_former_tries(
    ledger: WorkerLedger, client: Client
) -> None:
    """One death of a process among other jobs makes no job a suspect, the first of each life."""
    submitted(ledger, "job_1")
    for _ in range(2):
        first = claimed(ledger, "job_1")
        assert ledger.settle(first.id, first.token, "lost")
        again = claimed(ledger, "job_1")
        assert not again.solo
        ledger.fail(again, ERROR, "{}")
        assert client.retry_all(["job_1"]) == 1


def test_a_retry_leaves_of_a_record_what_its_request_and_its_fence_need(
    ledger: WorkerLedger, client: Client, raw_redis: "redis.Redis"
) -> None:
    submitted(ledger, "job_1", webhook=Webhook(url="https://example.org/"))
    before = set(raw_redis.hgetall(keys.job("job_1")))
    lost = claimed(ledger, "job_1")
    ledger.settle(lost.id, lost.token, "lost")
    ledger.fail(claimed(ledger, "job_1"), ERROR, "{}")
    client.retry_all(["job_1"])
    kept = set(raw_redis.hgetall(keys.job("job_1"))) - before
    assert kept == {"published_at", "attempts", "revivals", "nonce"}


def test_a_job_that_is_tried_again_tells_when_it_starts_again(
    ledger: WorkerLedger, client: Client, raw_redis: "redis.Redis"
) -> None:
    hook = Webhook(url="https://example.org/", events=["job.running"])
    submitted(ledger, "job_1", webhook=hook)
    ledger.fail(claimed(ledger, "job_1"), ERROR, "{}")
    client.retry_all(["job_1"])
    info = ledger.read("job_1")
    assert info is not None
    assert info.started_at is None
    claimed(ledger, "job_1")
    events = raw_redis.zrange(keys.outbox("example.org"), 0, -1)
    assert sorted(events) == ["job_1/job.running", "job_1/job.running/1"]


def test_a_deadline_that_has_passed_is_settled_before_a_filter_judges(
    ledger: WorkerLedger, client: Client
) -> None:
    submitted(ledger, "job_1", expires_in="1ms")
    submitted(ledger, "job_2")
    assert client.cancel_all(JobFilter(status="expired"), dry_run=True) == 0
    assert client.retry_all(JobFilter(status="expired"), dry_run=True) == 1


def test_no_more_jobs_are_queued_again_than_may_be_open(apart: Settings) -> None:
    with Client(apart.model_copy(update={"max_open_jobs": 3})) as client:
        jobs = client.submit_many([REQUEST] * 3)
        client.cancel_all([job.id for job in jobs])
        client.submit_many([REQUEST] * 2)
        with pytest.raises(QueueFull, match="1 are queued again"):
            client.retry_all([job.id for job in jobs])
