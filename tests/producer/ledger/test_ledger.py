"""What the ledger promises, a script at a time, on a real Redis.

A worker is played by hand: it claims, renews, finishes or dies.
"""

import json
import threading
import time
from typing import Any

import pytest
import redis
from redis._parsers.base import BaseParser

from blipq import (
    Client,
    IdempotencyConflict,
    JobInfo,
    Options,
    QueueFull,
    QueueUnavailable,
    Settings,
    Status,
    Submission,
    Webhook,
)
from blipq.contract import CONTRACT, CaptionRequest, Kind, MatchRequest
from blipq.ledger.codec import Message
from blipq.ledger.connection import COMPACT_FIELD, connect, redis_errors
from blipq.ledger.operator import OperatorLedger
from blipq.ledger.worker import MAX_CRASHES, Claim, Loss, Turn, WorkerLedger
from conftest import wait_until

IMAGE = "s3://uploads/cat.jpg"
REQUEST = CaptionRequest.model_validate({"image": IMAGE})
OTHER = MatchRequest.model_validate({"image": IMAGE, "texts": ["a cat"]})
QUEUE = "blipq.default.normal"
RESULT = json.dumps({"kind": "caption", "captions": [{"text": "a cat"}]})
ERROR = json.dumps({"code": "image_invalid", "message": "not an image", "retryable": False})
SOON_S = 0.03
LONG_SCRIPT = """
local from = redis.call('TIME')[1]
while redis.call('TIME')[1] - from < 2 do end
"""


def submitted(ledger: WorkerLedger, id: str = "job_1", **options: Any) -> Message | str:
    return ledger.submit(Submission(REQUEST, Options(**options), id), notify="test")


def claimed(
    ledger: WorkerLedger, id: str = "job_1", worker: str = "w1", lease_s: float = 30.0
) -> Claim:
    claim = ledger.claim(id, worker, lease_s=lease_s)
    assert isinstance(claim, Claim), claim
    return claim


def running(
    ledger: WorkerLedger, id: str = "job_1", lease_s: float = 30.0, **options: Any
) -> Claim:
    submitted(ledger, id, **options)
    return claimed(ledger, id, lease_s=lease_s)


def read(ledger: WorkerLedger, id: str = "job_1") -> JobInfo:
    info = ledger.read(id)
    assert info is not None
    return info


def published_again(ledger: WorkerLedger, grace_s: float = 60.0) -> list[str]:
    """Sweeps until something is due; the ids to publish."""
    swept: list[Message] = []
    wait_until(lambda: swept or swept.extend(ledger.reconcile(grace_s=grace_s).messages), "a sweep")
    return [message.id for message in swept]


def crash(ledger: WorkerLedger, id: str = "job_1") -> None:
    """A worker claims the job and is never heard of again; the reconciler notices."""
    claim = claimed(ledger, id, lease_s=SOON_S)
    if claim.solo:
        assert ledger.begin(claim)
    before = ledger.redis.hget(f"blipq:job:{id}", "crashes")
    wait_until(
        lambda: (
            ledger.reconcile().messages or ledger.redis.hget(f"blipq:job:{id}", "crashes") != before
        ),
        "the lease to run out",
    )


# --- submit ---------------------------------------------------------------------------------------


def test_a_submitted_job_is_queued_and_has_a_message(ledger: WorkerLedger) -> None:
    assert submitted(ledger, metadata={"order": "42"}) == Message(Kind.CAPTION, "job_1", QUEUE)
    info = read(ledger)
    assert (info.status, info.kind, info.model) == ("queued", "caption", "default")
    assert info.metadata == {"order": "42"}
    assert info.attempts == 0


def test_the_same_job_is_recorded_once(ledger: WorkerLedger) -> None:
    submitted(ledger)
    assert submitted(ledger) == "job_1"


def test_the_same_id_with_another_request_conflicts(ledger: WorkerLedger) -> None:
    submitted(ledger)
    with pytest.raises(IdempotencyConflict, match="job_1"):
        ledger.submit(Submission(OTHER, id="job_1"), notify="test")


def test_the_same_key_gives_the_first_job(ledger: WorkerLedger) -> None:
    submitted(ledger, "job_1", idempotency_key="order-42")
    assert submitted(ledger, "job_2", idempotency_key="order-42") == "job_1"
    assert ledger.read("job_2") is None


def test_the_same_key_with_other_options_conflicts(ledger: WorkerLedger) -> None:
    submitted(ledger, "job_1", idempotency_key="order-42")
    with pytest.raises(IdempotencyConflict):
        submitted(ledger, "job_2", idempotency_key="order-42", priority="high")


def test_metadata_in_another_order_is_the_same_request(ledger: WorkerLedger) -> None:
    submitted(ledger, "job_1", idempotency_key="k", metadata={"a": "1", "b": "2"})
    again = submitted(ledger, "job_2", idempotency_key="k", metadata={"b": "2", "a": "1"})
    assert again == "job_1"


def test_a_key_still_finds_a_job_that_has_ended(ledger: WorkerLedger) -> None:
    ledger.succeed(running(ledger, idempotency_key="order-42"), RESULT, "{}")
    assert submitted(ledger, "job_2", idempotency_key="order-42") == "job_1"


def test_more_open_jobs_than_allowed_are_refused(raw_redis: "redis.Redis", apart: Settings) -> None:
    ledger = WorkerLedger(raw_redis, apart.model_copy(update={"max_open_jobs": 1}))
    submitted(ledger, "job_1")
    with pytest.raises(QueueFull, match="BLIPQ_MAX_OPEN_JOBS"):
        submitted(ledger, "job_2")
    assert submitted(ledger, "job_1") == "job_1", "a known job is no new one"
    ledger.cancel("job_1")
    assert isinstance(submitted(ledger, "job_2"), Message)


def test_a_redis_without_memory_is_a_full_queue(own_redis: Settings) -> None:
    with connect(own_redis) as raw:
        raw.config_set("maxmemory", "1")
        with pytest.raises(QueueFull, match="maxmemory"):
            submitted(WorkerLedger(raw, own_redis))


def test_jobs_carry_the_lowest_contract_that_they_need(ledger: WorkerLedger) -> None:
    """A worker of contract 1 leaves the others in the queue: it would fail them."""
    submitted(ledger, "job_1", metadata={"order": "x" * 600})
    submitted(ledger, "job_2", output="s3://Results_1/2.json")
    assert ledger.redis.hget("blipq:job:job_1", "contract") == "1"
    assert ledger.redis.hget("blipq:job:job_2", "contract") == "2"


def test_a_record_that_has_ended_is_one_block_of_memory(own_redis: Settings) -> None:
    """On a Redis with the setting that the local stack, compose and the docs have."""
    receipt = json.dumps({"worker": "w" * 60, "revision": "0" * 40, "note": "n" * 300})
    with connect(own_redis) as raw:
        raw.config_set("hash-max-ziplist-value", COMPACT_FIELD)
        ledger = WorkerLedger(raw, own_redis)
        assert ledger.succeed(running(ledger), RESULT, receipt)
        assert raw.object("encoding", "blipq:job:job_1") == "listpack"


def test_a_job_takes_at_most_two_kilobytes(ledger: WorkerLedger, raw_redis: "redis.Redis") -> None:
    submitted(ledger, "job_0")
    before = raw_redis.info("memory")["used_memory_dataset"]
    for number in range(200):
        submitted(ledger, f"job_00000000-0000-7000-8000-{number:012}")
    taken = raw_redis.info("memory")["used_memory_dataset"] - before
    assert taken / 200 < 2048


# --- claim ----------------------------------------------------------------------------------------


def test_a_claim_carries_the_request(ledger: WorkerLedger) -> None:
    claim = running(ledger, output="s3://results/1.json", expires_in=60)
    assert CaptionRequest.model_validate_json(claim.request) == REQUEST
    assert (claim.output, claim.queue, claim.solo) == ("s3://results/1.json", QUEUE, False)
    assert 0 < claim.expires_in <= 60
    assert claim.queue_ms >= 0
    assert read(ledger).status is Status.RUNNING


def test_an_unknown_job_cannot_be_claimed(ledger: WorkerLedger) -> None:
    assert ledger.claim("job_9", "w1") == "unknown"


def test_a_running_job_is_busy(ledger: WorkerLedger) -> None:
    running(ledger)
    assert ledger.claim("job_1", "w2") == "busy"


@pytest.mark.parametrize("ending", ["succeeded", "failed", "cancelled"])
def test_an_ended_job_is_not_claimed_again(ledger: WorkerLedger, ending: str) -> None:
    end(ledger, running(ledger), ending)
    assert ledger.claim("job_1", "w2") == "ended"
    assert read(ledger).status == ending


def test_a_job_of_a_newer_contract_is_left_alone(
    ledger: WorkerLedger, raw_redis: "redis.Redis"
) -> None:
    submitted(ledger)
    raw_redis.hset("blipq:job:job_1", "contract", CONTRACT + 1)
    assert ledger.claim("job_1", "w1") == "newer"
    assert (read(ledger).status, read(ledger).attempts) == ("queued", 0)


def test_a_job_whose_deadline_passed_is_not_claimed(ledger: WorkerLedger) -> None:
    submitted(ledger, expires_in=SOON_S)
    wait_until(lambda: read(ledger).status == "expired", "the deadline")
    assert ledger.claim("job_1", "w1") == "ended"


# --- finish ---------------------------------------------------------------------------------------


def end(ledger: WorkerLedger, claim: Claim, ending: str) -> object:
    match ending:
        case "succeeded":
            return ledger.succeed(claim, RESULT, "{}")
        case "failed":
            return ledger.fail(claim, ERROR, "{}")
        case _:
            return ledger.cancel(claim.id)


def test_a_result_and_its_receipt_are_kept(ledger: WorkerLedger) -> None:
    claim = running(ledger)
    assert ledger.succeed(claim, RESULT, json.dumps({"tokens": 3}))
    info = read(ledger)
    assert (info.status, info.result.text, info.receipt.tokens) == ("succeeded", "a cat", 3)
    assert info.created_at <= info.started_at <= info.completed_at
    assert info.live_workers is None


def test_a_failure_keeps_its_error(ledger: WorkerLedger) -> None:
    assert ledger.fail(running(ledger), ERROR, "{}")
    info = read(ledger)
    assert (info.status, info.error.code, info.result) == ("failed", "image_invalid", None)


def test_a_job_ends_once(ledger: WorkerLedger) -> None:
    claim = running(ledger)
    assert ledger.succeed(claim, RESULT, "{}")
    assert not ledger.fail(claim, ERROR, "{}")
    assert not ledger.succeed(claim, RESULT.replace("cat", "dog"), "{}")
    assert read(ledger).result.text == "a cat"


def test_an_outcome_told_again_is_the_one_that_is_stored(ledger: WorkerLedger) -> None:
    """Its first answer was lost on the way."""
    claim = running(ledger)
    assert ledger.succeed(claim, RESULT, "{}")
    ended = read(ledger)
    assert ledger.succeed(claim, RESULT, "{}")
    assert read(ledger) == ended


def test_a_job_given_back_twice_is_given_back_once(ledger: WorkerLedger) -> None:
    claim = running(ledger)
    assert ledger.retry(claim, 60)
    assert ledger.retry(claim, 60)
    assert ledger.redis.hget("blipq:job:job_1", "retries") == "1"


def test_a_stale_worker_cannot_finish_a_job(ledger: WorkerLedger) -> None:
    submitted(ledger)
    stale = claimed(ledger, lease_s=SOON_S)
    published_again(ledger)
    claimed(ledger)
    assert not ledger.succeed(stale, RESULT, "{}")
    assert not ledger.begin(stale)
    assert ledger.renew({"job_1": stale.token}) == ["job_1"]
    assert not ledger.retry(stale, 0)
    assert not ledger.hand_back(stale)
    assert read(ledger).status is Status.RUNNING


def test_a_claim_makes_the_token_of_an_earlier_version_stale(ledger: WorkerLedger) -> None:
    """Workers of that version show ``token`` alone: one that was frozen would end this claim."""
    submitted(ledger)
    ledger.redis.hset("blipq:job:job_1", "token", 1)
    claim = claimed(ledger)
    assert ledger.redis.hget("blipq:job:job_1", "token") == "2"
    assert ledger.renew({"job_1": claim.token}) == []
    assert ledger.succeed(claim, RESULT, "{}")


def test_an_outcome_that_is_told_again_is_stored_once(ledger: WorkerLedger) -> None:
    """Its answer was lost. Another outcome of the same job is not this one."""
    claim = running(ledger)
    assert ledger.succeed(claim, RESULT, '{"queue_ms":1.5}')
    before = ledger.redis.hgetall("blipq:job:job_1")
    assert ledger.succeed(claim, RESULT, '{"queue_ms":1.5}')
    assert not ledger.succeed(claim, RESULT, '{"queue_ms":2.5}')
    assert not ledger.fail(claim, ERROR, "{}")
    assert ledger.redis.hgetall("blipq:job:job_1") == before


def test_a_claim_repeated_with_its_nonce_is_the_same_claim(ledger: WorkerLedger) -> None:
    """Its first answer was lost on the way."""
    submitted(ledger)
    first = ledger.claim("job_1", "w1", nonce="n1")
    again = ledger.claim("job_1", "w1", nonce="n1")
    assert isinstance(first, Claim)
    assert isinstance(again, Claim)
    assert (again.token, again.attempts) == (first.token, 1)
    assert ledger.claim("job_1", "w1", nonce="n2") == "busy"
    assert ledger.succeed(again, RESULT, "{}")


def test_a_claim_that_was_not_heard_of_is_withdrawn_uncounted(ledger: WorkerLedger) -> None:
    submitted(ledger)
    assert isinstance(ledger.claim("job_1", "w1", nonce="n1"), Claim)
    for _ in range(2):  # its answer may be lost, too
        (message,) = ledger.withdraw({"n1": "job_1", "n2": "job_unknown"})
        assert message.id == "job_1"
        assert (read(ledger).status, read(ledger).attempts) == (Status.QUEUED, 0)
    claim = ledger.claim("job_1", "w2", nonce="n3")
    assert isinstance(claim, Claim)
    assert ledger.withdraw({"n1": "job_1"}) == [], "another worker's claim is left alone"
    assert ledger.succeed(claim, RESULT, "{}")
    assert ledger.withdraw({"n3": "job_1"}) == []


def test_a_claim_that_arrives_after_it_was_withdrawn_is_refused(ledger: WorkerLedger) -> None:
    """Nobody would hear the answer: its lease would run out, which counts as a crash."""
    submitted(ledger)
    assert ledger.withdraw({"n1": "job_1"})
    assert ledger.claim("job_1", "w1", nonce="n1") == "busy"
    claim = ledger.claim("job_1", "w1", nonce="n2")
    assert isinstance(claim, Claim)
    assert ledger.hand_back(claim)
    assert ledger.claim("job_1", "w1", nonce="n2") == "busy"
    assert isinstance(ledger.claim("job_1", "w1", nonce="n3"), Claim)


def test_a_withdrawn_claim_is_refused_whoever_had_the_job_in_between(ledger: WorkerLedger) -> None:
    """Two workers stop with messages of one job, or a third had the job and gave it back."""
    submitted(ledger)
    assert ledger.withdraw({"n1": "job_1"})
    assert ledger.withdraw({"n2": "job_1"})
    claim = ledger.claim("job_1", "w3", nonce="n3")
    assert isinstance(claim, Claim)
    assert ledger.hand_back(claim)
    for late in ("n1", "n2", "n3"):
        assert ledger.claim("job_1", "w1", nonce=late) == "busy"
    assert (read(ledger).status, read(ledger).attempts) == (Status.QUEUED, 0)


def test_a_retry_that_is_told_again_counts_although_another_worker_withdrew(
    ledger: WorkerLedger,
) -> None:
    claim = running(ledger)
    assert ledger.retry(claim, 0)
    assert ledger.withdraw({"n9": "job_1"})
    assert ledger.retry(claim, 0), "its answer was lost: it is the same retry"
    assert read(ledger).status is Status.QUEUED


def test_a_token_does_not_come_twice_when_a_failover_forgot_its_claim(
    ledger: WorkerLedger, raw_redis: "redis.Redis"
) -> None:
    """A replica that lacked the claim became the master: the count starts where it was before."""
    submitted(ledger)
    before = raw_redis.dump("blipq:job:job_1")
    stale = claimed(ledger)
    raw_redis.restore("blipq:job:job_1", 10**6, before, replace=True)
    newer = claimed(ledger)
    assert newer.attempts == stale.attempts
    assert not ledger.succeed(stale, RESULT, "{}")
    assert ledger.succeed(newer, RESULT, "{}")


def test_a_suspect_is_handed_back_uncounted_and_runs_alone(ledger: WorkerLedger) -> None:
    assert ledger.hand_back(running(ledger), suspect=True)
    assert read(ledger).attempts == 0
    again = claimed(ledger)
    assert again.solo
    assert ledger.begin(again)


def test_a_job_that_was_lost_once_with_its_process_is_not_suspect(ledger: WorkerLedger) -> None:
    claim = running(ledger)
    assert ledger.settle(claim.id, claim.token, "lost")
    assert read(ledger).attempts == 0
    assert not claimed(ledger).solo


def test_a_job_that_is_lost_twice_with_its_process_runs_alone(ledger: WorkerLedger) -> None:
    """It may kill each process that takes it: not counted, this would go on for ever."""
    first = running(ledger)
    ledger.settle(first.id, first.token, "lost")
    second = claimed(ledger)
    assert ledger.settle(second.id, second.token, "lost")
    assert read(ledger).attempts == 0
    assert claimed(ledger).solo


def test_a_settled_crash_is_counted_and_the_last_one_ends_the_job(ledger: WorkerLedger) -> None:
    submitted(ledger)
    for crashes in range(1, MAX_CRASHES + 1):
        claim = claimed(ledger)
        assert claim.solo == (crashes > 1)
        if claim.solo:
            ledger.begin(claim)
        assert ledger.settle(claim.id, claim.token, "crash") == (crashes < MAX_CRASHES)
    info = read(ledger)
    assert info.error is not None
    assert (info.status, info.error.code, info.attempts) == (
        Status.FAILED,
        "attempts_exhausted",
        MAX_CRASHES,
    )
    assert ledger.redis.zscore("blipq:dead-letters", "job_1") is not None


@pytest.mark.parametrize("losses", [["suspect"], ["lost", "lost"], ["suspect", "suspect"]])
def test_a_suspect_is_charged_for_two_crashes_alone(
    ledger: WorkerLedger, losses: list[Loss]
) -> None:
    """As any job: one whose first crash was counted in company has two more as well."""
    submitted(ledger)
    for loss in losses:
        claim = claimed(ledger)
        ledger.settle(claim.id, claim.token, loss)
    for left in (True, False):
        claim = claimed(ledger)
        ledger.begin(claim)
        assert ledger.settle(claim.id, claim.token, "crash") is left
    info = read(ledger)
    assert info.error is not None
    assert (info.error.code, info.attempts) == ("attempts_exhausted", 2)


def test_a_crash_of_a_job_that_waits_to_run_alone_is_not_its_own(ledger: WorkerLedger) -> None:
    suspect = running(ledger)
    ledger.settle(suspect.id, suspect.token, "suspect")
    waiting = claimed(ledger)
    assert ledger.settle(waiting.id, waiting.token, "crash")
    assert read(ledger).attempts == 0


@pytest.mark.parametrize("loss", ["hand-back", "lost", "suspect", "crash"])
def test_a_loss_is_settled_once_and_only_with_its_claim(ledger: WorkerLedger, loss: Loss) -> None:
    claim = running(ledger)
    assert ledger.settle(claim.id, claim.token, loss)
    before = ledger.redis.hgetall("blipq:job:job_1")
    assert ledger.settle(claim.id, claim.token, loss)  # whose answer was lost
    assert ledger.redis.hgetall("blipq:job:job_1") == before
    newer = claimed(ledger)
    assert not ledger.settle(claim.id, claim.token, loss)
    assert ledger.begin(newer)


def test_a_job_that_its_process_died_of_fails_with_the_reason(ledger: WorkerLedger) -> None:
    claim = running(ledger)
    assert not ledger.fail_lost(claim.id, "9-other", ERROR)
    assert ledger.fail_lost(claim.id, claim.token, ERROR)
    info = read(ledger)
    assert info.error is not None
    assert (info.status, info.error.code, info.receipt) == (Status.FAILED, "image_invalid", None)


def test_an_outcome_after_the_deadline_is_dropped(ledger: WorkerLedger) -> None:
    claim = running(ledger, expires_in=SOON_S)
    assert claim.expires_in <= SOON_S
    deadline = float(ledger.redis.hget("blipq:job:job_1", "deadline"))
    wait_until(lambda: now_ms(ledger) > deadline, "the deadline")
    assert not ledger.succeed(claim, RESULT, "{}")
    assert read(ledger).status is Status.EXPIRED


def test_the_end_of_a_job_is_told_on_its_clients_channel(
    ledger: WorkerLedger, raw_redis: "redis.Redis"
) -> None:
    channel = "blipq:ended:test"
    with raw_redis.pubsub(ignore_subscribe_messages=True) as pubsub:
        pubsub.subscribe(channel)
        pubsub.get_message(timeout=5)
        ledger.succeed(running(ledger), RESULT, "{}")
        told = pubsub.get_message(timeout=5)
    assert (told["channel"], told["data"]) == (channel, "job_1")


# --- leases ---------------------------------------------------------------------------------------


def test_a_renewed_lease_lives_on(ledger: WorkerLedger, raw_redis: "redis.Redis") -> None:
    claim = running(ledger, lease_s=5)
    before = raw_redis.zscore("blipq:running", "job_1")
    assert ledger.renew({"job_1": claim.token}, lease_s=30) == []
    assert raw_redis.zscore("blipq:running", "job_1") > before


@pytest.mark.parametrize("ending", ["succeeded", "failed", "cancelled"])
def test_a_worker_hears_that_a_job_is_no_longer_its_own(ledger: WorkerLedger, ending: str) -> None:
    claim = running(ledger)
    end(ledger, claim, ending)
    assert ledger.renew({"job_1": claim.token}) == ["job_1"]


def test_a_worker_hears_that_another_took_its_job(ledger: WorkerLedger) -> None:
    claim = running(ledger)
    ledger.hand_back(claim)
    claimed(ledger, worker="w2")
    assert ledger.renew({"job_1": claim.token}) == ["job_1"]


def test_renewing_a_lease_past_the_deadline_ends_the_job(ledger: WorkerLedger) -> None:
    claim = running(ledger, expires_in=SOON_S)
    wait_until(lambda: ledger.renew({"job_1": claim.token}) == ["job_1"], "the deadline")
    assert read(ledger).status is Status.EXPIRED


def test_renewing_nothing_is_fine(ledger: WorkerLedger) -> None:
    assert ledger.renew({}) == []


# --- crashes --------------------------------------------------------------------------------------


def test_a_crashed_workers_job_is_published_again_and_then_runs_alone(ledger: WorkerLedger) -> None:
    running(ledger, lease_s=SOON_S)
    assert published_again(ledger) == ["job_1"]
    assert read(ledger).status is Status.QUEUED
    assert claimed(ledger).solo


def test_only_the_reconciler_judges_a_lease_that_ran_out(ledger: WorkerLedger) -> None:
    running(ledger, lease_s=0.001)
    assert ledger.claim("job_1", "w2") == "busy"
    assert read(ledger).status is Status.RUNNING
    assert published_again(ledger) == ["job_1"]


def test_no_lease_is_judged_by_who_has_just_got_the_turn(ledger: WorkerLedger) -> None:
    """After an outage of Redis every lease has run out, and the workers are well.

    Whether the owner heard that it got the turn does not matter: Redis may carry a sweep out that
    was sent before the outage, or given up during it.
    """
    running(ledger, lease_s=0.001)
    turn = Turn("w1", ttl_s=0.2, patience_s=0.1)

    def sweep() -> list[str]:
        return [message.id for message in ledger.reconcile(turn=turn).messages]

    assert [sweep(), sweep()] == [[], []]
    time.sleep(0.3)  # nobody sweeps, as in an outage
    assert sweep() == []
    assert read(ledger).status is Status.RUNNING
    wait_until(lambda: sweep() == ["job_1"], "the end of patience")


def test_a_turn_is_one_workers_until_it_sweeps_no_more(ledger: WorkerLedger) -> None:
    running(ledger, lease_s=0.001)
    ledger.reconcile(turn=Turn("w1", ttl_s=0.2, patience_s=60))
    other = Turn("w2", ttl_s=60, patience_s=0)
    assert ledger.reconcile(turn=other).messages == []
    wait_until(lambda: ledger.reconcile(turn=other).messages, "the end of the other's turn")


def test_a_crash_while_a_job_waits_to_run_alone_is_not_its_own(ledger: WorkerLedger) -> None:
    submitted(ledger)
    crash(ledger)
    for _ in range(MAX_CRASHES):
        assert claimed(ledger, lease_s=SOON_S).solo
        assert published_again(ledger) == ["job_1"]
    assert (read(ledger).status, read(ledger).attempts) == (Status.QUEUED, 1)


def test_a_job_that_was_taken_over_does_not_begin(ledger: WorkerLedger) -> None:
    submitted(ledger)
    crash(ledger)
    stale = claimed(ledger, lease_s=SOON_S)
    assert published_again(ledger) == ["job_1"]
    newer = claimed(ledger)
    assert not ledger.begin(stale)
    assert ledger.begin(newer)


def test_a_job_that_kills_its_workers_becomes_a_dead_letter(
    ledger: WorkerLedger, raw_redis: "redis.Redis"
) -> None:
    submitted(ledger)
    for _ in range(MAX_CRASHES):
        crash(ledger)
    info = read(ledger)
    assert (info.status, info.error.code) == ("failed", "attempts_exhausted")
    assert (info.attempts, info.error.retryable) == (MAX_CRASHES, False)
    assert raw_redis.zscore("blipq:dead-letters", "job_1")
    assert raw_redis.ttl("blipq:job:job_1") > 13 * 86400


def test_a_job_that_is_out_of_retries_becomes_a_dead_letter(
    ledger: WorkerLedger, raw_redis: "redis.Redis"
) -> None:
    ledger.fail(running(ledger), ERROR, "{}", dead=True)
    assert raw_redis.zscore("blipq:dead-letters", "job_1")


# --- retry and hand-back --------------------------------------------------------------------------


def test_a_retry_waits_for_its_time(ledger: WorkerLedger) -> None:
    ledger.retry(running(ledger), 60)
    assert read(ledger).status is Status.QUEUED
    assert ledger.claim("job_1", "w2") == "busy"
    assert ledger.reconcile().messages == []


def test_a_due_retry_is_published_and_counted(ledger: WorkerLedger) -> None:
    ledger.retry(running(ledger), SOON_S)
    assert published_again(ledger) == ["job_1"]
    again = claimed(ledger)
    assert (again.retries, again.attempts, again.solo) == (1, 2, False)


def test_a_job_handed_back_has_lost_no_attempt(ledger: WorkerLedger) -> None:
    assert ledger.hand_back(running(ledger))
    assert (read(ledger).status, read(ledger).attempts) == ("queued", 0)
    again = claimed(ledger)
    assert (again.attempts, again.retries) == (1, 0)


# --- cancel ---------------------------------------------------------------------------------------


def test_a_queued_job_is_cancelled(ledger: WorkerLedger) -> None:
    submitted(ledger)
    assert ledger.cancel("job_1") == "cancelled"
    assert read(ledger).status is Status.CANCELLED


def test_a_running_job_is_cancelled_and_its_result_dropped(ledger: WorkerLedger) -> None:
    claim = running(ledger)
    assert ledger.cancel("job_1") == "cancelled"
    assert not ledger.succeed(claim, RESULT, "{}")
    assert read(ledger).result is None


def test_a_job_waiting_for_a_retry_is_cancelled(ledger: WorkerLedger) -> None:
    ledger.retry(running(ledger), SOON_S)
    assert ledger.cancel("job_1") == "cancelled"
    assert ledger.reconcile().messages == []


@pytest.mark.parametrize("ending", ["succeeded", "failed", "cancelled"])
def test_an_ended_job_cannot_be_cancelled(ledger: WorkerLedger, ending: str) -> None:
    end(ledger, running(ledger), ending)
    assert ledger.cancel("job_1") == "ended"
    assert read(ledger).status == ending


def test_an_unknown_job_cannot_be_cancelled(ledger: WorkerLedger) -> None:
    assert ledger.cancel("job_9") == "unknown"


def test_a_job_that_is_put_off_is_claimed_and_published_only_when_it_is_due(
    ledger: WorkerLedger,
) -> None:
    submitted(ledger)
    assert ledger.put_off("job_1", SOON_S)
    assert ledger.claim("job_1", "w1") == "busy"
    assert published_again(ledger, grace_s=60) == ["job_1"]
    assert isinstance(ledger.claim("job_1", "w1"), Claim)
    assert not ledger.put_off("job_1", SOON_S), "it runs"


def test_an_ended_job_keeps_what_is_read_of_it_alone(ledger: WorkerLedger) -> None:
    assert ledger.succeed(running(ledger), RESULT, "{}")
    left = set(ledger.redis.hkeys("blipq:job:job_1"))
    promised = {"status", "kind", "model", "queue", "created_at", "started_at", "completed_at"}
    promised |= {"deadline", "attempts", "notify", "request", "result", "receipt"}
    assert left == promised | {"digest"}


@pytest.mark.parametrize("ended", ["failed", "dead", "cancelled", "expired"])
def test_a_job_without_a_result_keeps_what_it_needs_to_run_again(
    ledger: WorkerLedger, client: Client, ended: str
) -> None:
    if ended == "expired":
        submitted(ledger, expires_in="1ms")
        wait_until(lambda: read(ledger).ended, "the deadline")
    elif ended == "cancelled":
        submitted(ledger)
        ledger.cancel("job_1")
    else:
        assert ledger.fail(running(ledger), ERROR, "{}", dead=ended == "dead")
    fields = ledger.redis.hgetall("blipq:job:job_1")
    assert {"contract", "result_ttl", "failed_ttl", "notify"} <= fields.keys()
    assert not {"worker", "published_at", "retries", "last_error"} & fields.keys()
    assert client.retry_all(["job_1"]) == 1
    assert ledger.succeed(claimed(ledger), RESULT, "{}")
    assert ledger.redis.ttl("blipq:job:job_1") > 86000


# --- reconcile ------------------------------------------------------------------------------------


def test_a_waiting_job_is_not_published_again_while_workers_are_busy(ledger: WorkerLedger) -> None:
    submitted(ledger)
    ledger.register("w1", ["default"], "{}", ttl_s=5, spare=False)
    assert ledger.reconcile(grace_s=0.001).messages == []


def test_a_lost_message_is_published_again_when_a_worker_idles(ledger: WorkerLedger) -> None:
    submitted(ledger)
    ledger.register("w1", ["default"], "{}", ttl_s=5, spare=True)
    assert ledger.reconcile(grace_s=60).messages == [], "within its grace it may be on its way"
    assert published_again(ledger, grace_s=SOON_S) == ["job_1"]


def test_an_idle_worker_of_another_model_proves_nothing(ledger: WorkerLedger) -> None:
    submitted(ledger)
    ledger.register("w1", ["other"], "{}", ttl_s=5, spare=True)
    assert ledger.reconcile(grace_s=0.001).messages == []


def test_a_job_overtaken_in_its_queue_has_lost_its_message(ledger: WorkerLedger) -> None:
    submitted(ledger, "job_1")
    first = ledger.redis.zscore(f"blipq:queued:{QUEUE}", "job_1")
    wait_until(lambda: now_ms(ledger) > first + 1000 * SOON_S, "a later moment")
    running(ledger, "job_2")
    assert ledger.reconcile(grace_s=60).messages == []
    assert published_again(ledger, grace_s=SOON_S / 2) == ["job_1"]


def test_a_job_is_published_again_once_per_grace(ledger: WorkerLedger) -> None:
    submitted(ledger)
    ledger.register("w1", ["default"], "{}", ttl_s=60, spare=True)
    published_again(ledger, grace_s=SOON_S)
    assert ledger.reconcile(grace_s=60).messages == []


def test_a_queue_that_somebody_takes_from_is_not_idle(ledger: WorkerLedger) -> None:
    """A free thread now and then is no proof: what waits in it is a backlog."""
    submitted(ledger, "job_1")
    claimed(ledger, "job_1")
    submitted(ledger, "job_2")
    ledger.register("w1", ["default"], "{}", ttl_s=60, spare=True)
    taken = ledger.redis.get(f"blipq:taken:{QUEUE}")
    ledger.redis.set(f"blipq:taken:{QUEUE}", float(taken) + 60_000, ex=60)
    queued = ledger.redis.zscore(f"blipq:queued:{QUEUE}", "job_2")
    wait_until(lambda: now_ms(ledger) > queued + 1, "a moment")
    assert ledger.reconcile(grace_s=0.001).messages == []
    ledger.redis.set(f"blipq:taken:{QUEUE}", taken, ex=60)
    assert published_again(ledger, grace_s=0.001) == ["job_2"]


def test_no_more_is_published_again_than_the_brokers_list_lacks(ledger: WorkerLedger) -> None:
    for number in range(5):
        submitted(ledger, f"job_{number}")
    ledger.redis.lpush(QUEUE, "a message", "another")
    ledger.redis.lpush(f"{QUEUE}\x06\x163", "one with a priority")
    last = ledger.redis.zscore(f"blipq:queued:{QUEUE}", "job_4")
    wait_until(lambda: now_ms(ledger) > last + 1000 * SOON_S, "all of them late")
    ledger.register("w1", ["default"], "{}", ttl_s=60, spare=True)
    assert published_again(ledger, grace_s=SOON_S) == ["job_0", "job_1"]
    ledger.redis.delete(QUEUE, f"{QUEUE}\x06\x163")


def test_a_job_that_had_its_turn_has_lost_its_message_where_the_list_lacks_one(
    ledger: WorkerLedger,
) -> None:
    """Its worker died with the message in hand: nothing is as young as a grace, nobody idles."""
    submitted(ledger, "job_1")
    submitted(ledger, "job_2")
    running(ledger, "job_3")
    ledger.redis.lpush(QUEUE, "the message of job_2")
    assert ledger.reconcile(grace_s=60).messages == []
    assert published_again(ledger, grace_s=3 * SOON_S) == ["job_1"]
    ledger.redis.lpush(QUEUE, "the message of job_1, again")
    assert ledger.reconcile(grace_s=0.003).messages == []
    ledger.redis.delete(QUEUE)


def test_a_job_that_was_published_again_makes_no_other_look_overtaken(ledger: WorkerLedger) -> None:
    """Its first message may be the one that came: it says nothing about later ones."""
    submitted(ledger, "job_1")
    ledger.register("w1", ["default"], "{}", ttl_s=60, spare=True)
    published_again(ledger, grace_s=SOON_S)
    ledger.redis.delete("blipq:spare:default")
    submitted(ledger, "job_2")
    last = float(ledger.redis.zscore(f"blipq:queued:{QUEUE}", "job_2"))
    ledger.redis.zadd(f"blipq:queued:{QUEUE}", {"job_1": last + 60_000})
    claimed(ledger, "job_1")
    wait_until(lambda: now_ms(ledger) > last + 1000 * SOON_S, "a later moment")
    assert ledger.reconcile(grace_s=SOON_S).messages == []


def test_the_age_of_a_job_counts_from_its_first_message(ledger: WorkerLedger) -> None:
    submitted(ledger)
    first = ledger.redis.zscore(f"blipq:queued:{QUEUE}", "job_1")
    ledger.register("w1", ["default"], "{}", ttl_s=60, spare=True)
    published_again(ledger, grace_s=SOON_S)
    (queue,) = OperatorLedger.beside(ledger).queues()
    assert queue.oldest_s == pytest.approx((now_ms(ledger) - float(first)) / 1000, abs=0.5)
    assert queue.oldest_s >= SOON_S
    claimed(ledger)
    assert OperatorLedger.beside(ledger).queues()[0].oldest_s is None


def test_a_queue_stays_listed_while_no_job_waits_in_it(ledger: WorkerLedger) -> None:
    """Workers of an earlier version give jobs back without listing the queue, and their sweep drops
    queues of low scores: the job's next message could be lost unseen.
    """
    claim = running(ledger)
    used = ledger.redis.zscore("blipq:queues", QUEUE)
    ledger.reconcile()
    assert ledger.redis.zscore("blipq:queues", QUEUE) == used
    assert [queue.queue for queue in OperatorLedger.beside(ledger).queues()] == [QUEUE]
    ledger.redis.hset("blipq:job:job_1", "status", "queued")
    ledger.redis.zrem("blipq:running", claim.id)
    ledger.redis.zadd(f"blipq:queued:{QUEUE}", {claim.id: now_ms(ledger)})
    ledger.redis.delete(f"blipq:taken:{QUEUE}")
    ledger.register("w1", ["default"], "{}", ttl_s=60, spare=True)
    assert published_again(ledger, grace_s=SOON_S) == ["job_1"]


def test_a_sweep_is_bounded(ledger: WorkerLedger) -> None:
    for number in range(5):
        ledger.retry(running(ledger, f"job_{number}"), 0.001)
    due = now_ms(ledger) + 1
    wait_until(lambda: now_ms(ledger) > due, "the retries to be due")
    first, rest = ledger.reconcile(limit=3), ledger.reconcile(limit=3)
    assert (len(first.messages), first.more) == (3, True)
    assert (len(rest.messages), rest.more) == (2, False)


def test_a_passed_deadline_is_settled_by_reading(ledger: WorkerLedger) -> None:
    submitted(ledger, expires_in=SOON_S)
    wait_until(lambda: read(ledger).status == "expired", "the deadline")
    assert ledger.redis.zscore("blipq:open", "job_1") is None


def test_a_passed_deadline_is_settled_by_a_sweep(
    ledger: WorkerLedger, raw_redis: "redis.Redis"
) -> None:
    submitted(ledger, expires_in=SOON_S)
    wait_until(
        lambda: (
            ledger.reconcile().messages or raw_redis.hget("blipq:job:job_1", "status") == "expired"
        ),
        "the deadline",
    )


def now_ms(ledger: WorkerLedger) -> float:
    seconds, micros = ledger.redis.time()
    return seconds * 1000 + micros / 1000


# --- workers --------------------------------------------------------------------------------------


def test_an_open_job_says_how_many_live_workers_serve_its_model(ledger: WorkerLedger) -> None:
    submitted(ledger)
    assert read(ledger).live_workers == 0
    ledger.register("w1", ["default", "other"], "{}", ttl_s=60, spare=True)
    ledger.register("w2", ["default"], "{}", ttl_s=60, spare=False)
    assert read(ledger).live_workers == 2


def test_a_worker_that_is_not_heard_of_is_not_live(ledger: WorkerLedger) -> None:
    submitted(ledger)
    ledger.register("w1", ["default"], "{}", ttl_s=SOON_S, spare=True)
    wait_until(lambda: read(ledger).live_workers == 0, "the worker to be missed")


def test_one_owner_holds_a_lock_until_it_runs_out(ledger: WorkerLedger) -> None:
    assert ledger.lock("blipq:lock", "w1", 60) == "new"
    assert ledger.lock("blipq:lock", "w2", 60) == "taken"
    assert ledger.lock("blipq:lock", "w1", 0.02) == "kept"
    wait_until(lambda: ledger.lock("blipq:lock", "w2", 1) == "new", "the lock to run out")


# --- foreign messages -----------------------------------------------------------------------------


def test_a_refused_message_leaves_a_failed_job(ledger: WorkerLedger) -> None:
    assert ledger.refuse("job_1", Kind.CAPTION, ERROR)
    assert (read(ledger).status, read(ledger).error.code) == ("failed", "image_invalid")
    assert ledger.claim("job_1", "w1") == "ended"


def test_a_known_job_cannot_be_refused(ledger: WorkerLedger) -> None:
    submitted(ledger)
    assert not ledger.refuse("job_1", Kind.CAPTION, ERROR)
    assert read(ledger).status is Status.QUEUED


# --- Redis ----------------------------------------------------------------------------------------


def test_every_key_expires(ledger: WorkerLedger, raw_redis: "redis.Redis") -> None:
    hook = Webhook(url="https://example.org/hook")
    ledger.fail(running(ledger, "job_1", idempotency_key="a", webhook=hook), ERROR, "{}", dead=True)
    ledger.retry(running(ledger, "job_2"), 60)
    running(ledger, "job_3")
    submitted(ledger, "job_4")
    ledger.register("w1", ["default"], "{}", ttl_s=5, spare=True)
    ledger.lock("blipq:lock", "w1", 5000)
    ledger.reconcile(turn=Turn("w1", ttl_s=5000, patience_s=60))
    keys = list(raw_redis.scan_iter("blipq:*"))
    assert len(keys) >= 14, keys
    assert [key for key in keys if raw_redis.ttl(key) < 0] == []


def test_an_open_job_outlives_its_deadline(ledger: WorkerLedger, raw_redis: "redis.Redis") -> None:
    submitted(ledger, expires_in="30d")
    assert raw_redis.ttl("blipq:job:job_1") > 30 * 86400


@pytest.mark.parametrize(("ending", "days"), [("succeeded", 1), ("failed", 7), ("cancelled", 1)])
def test_an_ended_job_is_kept_for_its_retention(
    ledger: WorkerLedger, raw_redis: "redis.Redis", ending: str, days: int
) -> None:
    end(ledger, running(ledger), ending)
    assert days * 86400 - 60 < raw_redis.ttl("blipq:job:job_1") <= days * 86400


def test_scripts_that_redis_forgot_are_loaded_again(
    ledger: WorkerLedger, raw_redis: "redis.Redis"
) -> None:
    submitted(ledger)
    raw_redis.script_flush()
    assert read(ledger).status is Status.QUEUED


def test_a_redis_that_is_down_is_an_unavailable_queue(apart: Settings) -> None:
    nowhere = apart.model_copy(update={"redis_url": "redis://127.0.0.1:1/0"})
    with connect(nowhere) as raw, pytest.raises(QueueUnavailable, match="Redis") as raised:
        submitted(WorkerLedger(raw, nowhere), "job_7")
    assert raised.value.job_id == "job_7"


@pytest.mark.parametrize(
    "reply",
    [
        "NOREPLICAS Not enough good replicas to write.",
        "MISCONF Redis is configured to save RDB snapshots, but it cannot.",
        "BUSY Redis is busy running a script.",
        "UNBLOCKED force unblock from blocking operation, instance state changed",
        "READONLY You can't write against a read only replica.",
        "LOADING Redis is loading the dataset in memory",
        "MASTERDOWN Link with MASTER is down",
        "CLUSTERDOWN The cluster is down",
        "TRYAGAIN Multiple keys request during rehashing of slot",
        "NOPERM No permissions to run the 'evalsha' command",
        "ERR Error running script (call to f_0a1b): @user_script:7: -READONLY You can't write",
    ],
)
def test_a_server_that_refuses_for_now_is_an_unavailable_queue(reply: str) -> None:
    error = BaseParser.parse_error(reply)
    with pytest.raises(QueueUnavailable), redis_errors():
        raise error


@pytest.mark.parametrize(
    "reply", ["WRONGTYPE Operation against a key", "ERR user_script:3: attempt to index a nil"]
)
def test_a_mistake_of_ours_is_no_outage(reply: str) -> None:
    error = BaseParser.parse_error(reply)
    with pytest.raises(redis.ResponseError), redis_errors():
        raise error


def test_a_redis_that_runs_a_long_script_is_unavailable(own_redis: Settings) -> None:
    with connect(own_redis) as raw, connect(own_redis, timeout_s=20) as hog:
        raw.config_set("busy-reply-threshold", 100)
        ledger = WorkerLedger(raw, own_redis)
        submitted(ledger)
        busy = threading.Thread(target=hog.eval, args=(LONG_SCRIPT, 0))
        busy.start()
        with pytest.raises(QueueUnavailable, match="BUSY"):
            wait_until(lambda: ledger.read("job_1") is None, "the script to be in the way")
        busy.join()
        assert read(ledger).status is Status.QUEUED


def test_a_wrong_password_is_told(apart: Settings) -> None:
    host = apart.redis_url.rsplit("@", 1)[1]
    locked = apart.model_copy(update={"redis_url": f"redis://:wrong@{host}"})
    with connect(locked) as raw, pytest.raises(QueueUnavailable, match="password"):
        WorkerLedger(raw, locked).read("job_1")
