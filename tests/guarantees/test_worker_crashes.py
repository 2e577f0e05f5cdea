"""Faults 1-3, 6-8 and 11: a worker dies, freezes or hangs, and every job still ends once."""

import json
import os
import signal
import time
from functools import partial
from typing import Any

import pytest
import redis

from blipq import CaptionRequest, ErrorCode, Job, Status
from blipq.ledger.codec import Message
from blipq.s3.outputs import LOCAL_BUCKET
from conftest import wait_until
from guarantees.rig import LEASE_S, Rig, both_forms, png
from guarantees.stand_ins.faulty_worker import HANGING_SIZE
from stacks import BROKER


def test_jobs_of_a_killed_worker_all_succeed_on_the_next(rig: Rig) -> None:
    first = rig.start_worker(max_batch_size=16)
    jobs = rig.submit_all(["sleep 0.03"] * 232)
    wait_until(lambda: rig.running() >= 32, "a full worker")
    rig.kill(first)
    rig.start_worker(max_batch_size=16)
    rig.all_succeed(jobs, timeout=90)
    assert max(job.info().attempts for job in jobs) == 2


def test_a_job_of_a_killed_worker_is_claimed_again_a_second_after_its_lease_at_most(
    rig: Rig,
) -> None:
    first = rig.start_worker()
    job = rig.submit("sleep 25")
    wait_until(lambda: rig.running() == 1, "the job to run")
    rig.start_worker()
    killed_at = time.monotonic()
    rig.kill(first)
    wait_until(lambda: job.info().attempts == 2, "another claim", LEASE_S + 30)
    waited = time.monotonic() - killed_at
    print(f"claimed again after {waited:.1f} s")  # shown with -s
    assert waited <= LEASE_S + 1


@pytest.mark.skipif(BROKER != "redis", reason="RabbitMQ has such messages back at once")
def test_messages_that_die_with_their_worker_unclaimed_are_back_within_a_grace(rig: Rig) -> None:
    """Redis keeps no copy of what a worker has in hand, and a busy worker has no room to say so."""
    rig.start_worker(max_batch_size=1)
    jobs = rig.submit_all(["sleep 0.2"] * 100)
    wait_until(lambda: rig.running() == 2, "a full worker")
    queue = "blipq.default.normal"
    in_hand = [json.loads(each) for each in rig.redis(lambda raw: raw.rpop(queue, 5))]
    died_at = time.monotonic()
    ids = {each["headers"]["id"] for each in in_hand}
    assert len(ids) == 5

    def listed() -> set[str]:
        left = rig.redis(lambda raw: raw.lrange(queue, 0, -1))
        return {json.loads(each)["headers"]["id"] for each in left}

    wait_until(lambda: ids <= listed(), "their messages", LEASE_S + 30)
    assert time.monotonic() - died_at <= min(10.0, LEASE_S) + 1
    assert len(listed()) > 20, "the backlog has not gone yet"
    rig.all_succeed(jobs, timeout=60)
    assert {job.info().attempts for job in jobs} == {1}


def test_a_worker_killed_among_foreign_jobs_loses_at_most_what_it_was_reading(rig: Rig) -> None:
    """Their messages are all there is of them until they are recorded."""
    ids = [f"job_foreign_{number}" for number in range(500)]
    for id in ids:
        request = {"image": rig.image.uri, "prompt": f"sleep 0.01 {id}"}
        rig.send({"task": "blipq.caption", "id": id}, json.dumps([[id, request], {}, {}]))

    def count_ended(raw: "redis.Redis") -> int:
        lists = raw.scan_iter("blipq:listed:*:succeeded", count=1000)
        return sum(int(raw.zcard(each)) for each in lists)

    def ended(at_least: int) -> bool:
        return rig.redis(count_ended) >= at_least

    for at_least in (20, 170, 320):
        worker = rig.start_worker(max_batch_size=16)
        wait_until(partial(ended, at_least), "jobs to end", timeout=60)
        rig.kill(worker)
    rig.start_worker(max_batch_size=16)
    wait_until(lambda: all(rig.client.ledger.read(id) for id in ids[-20:]), "the last of them", 60)
    known = [id for id in ids if rig.client.ledger.read(id) is not None]
    assert len(known) >= len(ids) - 3 * 17, "one read for each kill"
    rig.all_succeed([rig.client.job(id) for id in known], timeout=60)


def test_twenty_kills_at_full_rate_lose_and_double_nothing(rig: Rig) -> None:
    """``GUARANTEES_JOBS=20000`` makes it longer."""
    count = int(os.environ.get("GUARANTEES_JOBS", "3000"))
    jobs = rig.client.submit_many(
        CaptionRequest(image=rig.image, prompt=f"job {number}") for number in range(count)
    )
    for kill in range(20):
        worker = rig.start_worker(max_batch_size=16)
        left = count - count * (kill + 1) // 22
        wait_until(partial(rig.has_at_most, left), f"{left} open jobs", timeout=120)
        rig.kill(worker)
    rig.start_worker(max_batch_size=16)
    rig.all_succeed(jobs, timeout=300)
    assert max(job.info().attempts for job in jobs) < 4


def test_a_worker_frozen_past_its_lease_cannot_finish_a_job_twice(rig: Rig) -> None:
    frozen = rig.start_worker()
    job = rig.submit("sleep 2")
    wait_until(lambda: rig.running() == 1, "the job to run")
    frozen.signal(signal.SIGSTOP)
    frozen_at = time.monotonic()
    rig.start_worker()
    wait_until(lambda: job.info().attempts == 2, "another claim", LEASE_S + 30)
    waited = time.monotonic() - frozen_at
    print(f"claimed again after {waited:.1f} s")  # shown with -s
    # RabbitMQ pushes the message to the frozen worker too, whose connection still stands: there it
    # stays unacknowledged until it is published once more.
    assert waited <= LEASE_S * (1 if BROKER == "redis" else 2) + 1
    info = job.wait(30)
    frozen.signal(signal.SIGCONT)
    wait_until(
        lambda: "too late" in frozen.last_words() or "taken over" in frozen.last_words(),
        "the stale worker to notice",
    )
    again = job.info()
    assert (again.status, again.completed_at) == (Status.SUCCEEDED, info.completed_at)
    assert again.receipt == info.receipt


def test_a_write_that_arrives_late_leaves_a_newer_answer_alone(rig: Rig) -> None:
    """Its worker is frozen and the write still on its way when another worker has answered."""
    uri = f"s3://{LOCAL_BUCKET}/fault=heldx2/answer.json"  # the first HEAD and the first PUT
    frozen = rig.start_worker()
    job = rig.submit("fine", output=uri)
    wait_until(lambda: rig.s3.held, "the write to be on its way")
    frozen.signal(signal.SIGSTOP)
    rig.start_worker()
    assert job.wait(LEASE_S + 60).status is Status.SUCCEEDED
    key = uri.partition("//")[2].partition("/")[2]
    written = rig.client.storage.head(LOCAL_BUCKET, key)
    assert rig.s3.writes == [200]
    rig.s3.release.set()
    wait_until(lambda: len(rig.s3.writes) == 2, "the late write")
    assert rig.s3.writes[1] in (409, 412)
    frozen.signal(signal.SIGCONT)
    wait_until(
        lambda: "taken over" in frozen.last_words() or "again in" in frozen.last_words(),
        "the stale worker to notice",
    )
    assert rig.client.storage.head(LOCAL_BUCKET, key)["LastModified"] == written["LastModified"]  # type: ignore[index]
    assert job.info().status is Status.SUCCEEDED


@both_forms
@pytest.mark.parametrize("death", ["exit", "segfault"])
def test_a_job_that_keeps_killing_workers_becomes_a_dead_letter_and_harms_no_other(
    rig: Rig, death: str
) -> None:
    poison = rig.submit(death)
    others = rig.submit_all(["sleep 0.1"] * 20)
    deaths = _restart_until_ended(rig, poison)
    info = poison.info()
    assert info.error is not None
    assert (info.status, info.error.code) == (Status.FAILED, ErrorCode.ATTEMPTS_EXHAUSTED)
    assert deaths <= 3
    assert [letter.id for letter in rig.operator.dead_letters()] == [poison.id]
    rig.start_worker()
    rig.all_succeed(others, timeout=60)


def _restart_until_ended(rig: Rig, job: Job[Any]) -> int:
    """Keeps a worker running, as a supervisor would, until the job ends; how many died."""
    deaths = 0
    worker = rig.launch_worker()

    def settled() -> bool:
        return worker.exit_code is not None or job.info().ended

    while True:
        wait_until(settled, "a death or the end", timeout=200)
        if job.info().ended:
            return deaths
        deaths += 1
        worker = rig.launch_worker()


def test_a_hung_model_ends_its_process_and_the_job_in_the_end(rig: Rig) -> None:
    job = rig.submit("hang")
    for _ in range(3):
        worker = rig.launch_worker(watchdog_s=2)
        rig.wait_for_death(worker)
        assert worker.exit_code == 70
    rig.start_worker()
    info = job.wait(LEASE_S + 20)
    assert info.error is not None
    assert info.error.code is ErrorCode.ATTEMPTS_EXHAUSTED


def test_a_match_that_hangs_ends_its_process_too(rig: Rig) -> None:
    worker = rig.start_worker(watchdog_s=2)
    rig.client.match(rig.image, ["a cat", "hang"])
    rig.wait_for_death(worker)
    assert worker.exit_code == 70
    assert "no progress for" in worker.last_words()


def test_a_hung_decoder_ends_its_process_and_the_job_goes_on_alone(rig: Rig) -> None:
    worker = rig.start_worker(watchdog_s=2)
    image = rig.upload("none", png(size=HANGING_SIZE))
    job = rig.client.caption(image)
    rig.wait_for_death(worker)
    assert worker.exit_code == 70
    rig.client.storage.put(image, png(), content_type="image/png")
    rig.start_worker()
    assert job.wait(LEASE_S + 20).attempts == 2


@both_forms
def test_a_finished_job_that_is_delivered_again_keeps_its_result(rig: Rig) -> None:
    """The worker died between storing the outcome and acknowledging the message."""
    rig.start_worker()
    job = rig.submit("once")
    info = job.wait(20)
    again = Message(info.kind, job.id, "blipq.default.normal")
    assert rig.client.broker.publish_all([again] * 5)
    marker = rig.submit("after")
    marker.result(20)
    assert job.info() == info
