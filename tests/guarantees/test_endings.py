"""Faults 4, 9, 10, 20-27, 35 and 36: each way a job can end, and only one of them."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from blipq import (
    Client,
    ErrorCode,
    IdempotencyConflict,
    JobCancelled,
    JobFailed,
    Priority,
    QueueUnavailable,
    Status,
    UnknownModel,
)
from blipq.contract import CaptionRequest, JobError, Options
from blipq.ledger.codec import Message
from blipq.ledger.worker import Claim
from blipq.local.supervisor import Service
from blipq.submission import Submission, new_id
from blipq_worker.settings import WorkerSettings
from conftest import ledger_of, wait_until
from guarantees.rig import LEASE_S, Rig
from stacks import BROKER


def test_a_job_whose_message_was_never_published_runs_all_the_same(rig: Rig) -> None:
    """The client died between recording the job and publishing it."""
    request = CaptionRequest(image=rig.image, prompt="lost")
    id = new_id()
    assert isinstance(rig.client.ledger.submit(Submission(request, id=id), notify="x"), Message)
    rig.start_worker()
    assert rig.client.job(id).wait(30).status is Status.SUCCEEDED


def test_a_fleet_scaled_to_zero_takes_jobs_and_runs_them_when_it_is_back(rig: Rig) -> None:
    models = {"models": "default=fake,opt=fake"}
    rig.start_worker(**models).stop(timeout=30)
    wait_until(lambda: rig.submit("fine", model="opt").info().live_workers == 0, "zero")
    jobs = [rig.submit("fine", model=model) for model in ("default", "opt") for _ in range(5)]
    assert jobs[-1].info().note == "no live worker serves the model 'opt'"
    with pytest.raises(UnknownModel, match="'opt' \\(no live worker now\\)"):
        rig.submit("fine", model="op")
    rig.start_worker(**models)
    rig.all_succeed(jobs)


@pytest.mark.skipif(BROKER != "redis", reason="other brokers do not show their queues")
def test_a_foreign_job_for_an_unknown_model_ends_on_record(rig: Rig) -> None:
    """It lay in a queue that nobody reads, without a record and without an end."""
    id = new_id()
    body = json.dumps([[id, {"image": rig.image.uri}], {}, {}])
    message = {"headers": {"lang": "js", "task": "blipq.caption", "id": id}, "body": body}
    rig.put("blipq.ghost.normal", json.dumps(message).encode())
    rig.start_worker()
    wait_until(lambda: rig.client.ledger.read(id), "its record")
    info = rig.client.job(id).info()
    assert info.error is not None
    assert (info.status, info.model, info.error.code) == ("failed", "ghost", "invalid_request")
    assert not rig.redis(lambda raw: raw.exists("blipq.ghost.normal"))


def test_a_repeated_submit_is_the_same_job(rig: Rig) -> None:
    request = CaptionRequest(image=rig.image, prompt="once")
    id = new_id()
    first, again = (rig.client.submit(request, id=id) for _ in range(2))
    assert first == again
    rig.start_worker()
    assert first.wait(20).attempts == 1


def test_a_model_error_fails_its_job_at_once_and_no_other(rig: Rig) -> None:
    rig.start_worker(batch_wait_timeout_s=0.2)
    others = rig.submit_all(["fine"] * 5)
    bad = rig.submit("raise")
    rig.all_succeed([*others, *rig.submit_all(["fine"] * 5)])
    info = bad.wait(20)
    assert info.error is not None
    assert (info.error.code, info.attempts) == (ErrorCode.INTERNAL, 1)


def test_only_what_runs_out_of_memory_alone_fails(rig: Rig) -> None:
    rig.start_worker(batch_wait_timeout_s=0.3)
    jobs = rig.submit_all(["oom-in-company"] * 4)
    alone = rig.submit("oom")
    rig.all_succeed(jobs)
    with pytest.raises(JobFailed) as failed:
        alone.result(20)
    assert failed.value.code is ErrorCode.OUT_OF_MEMORY


def test_a_job_longer_than_its_lease_runs_once(rig: Rig) -> None:
    rig.start_worker()
    job = rig.submit(f"sleep {LEASE_S * 2.5}")
    assert job.wait(20 * LEASE_S).attempts == 1


def test_a_message_delivered_five_times_runs_its_job_once(rig: Rig) -> None:
    rig.start_worker()
    job = rig.submit("sleep 0.5")
    message = Message(job.info().kind, job.id, "blipq.default.normal")
    rig.client.broker.publish_all([message] * 5)
    assert job.wait(20).attempts == 1


def test_one_idempotency_key_used_fifty_times_at_once_is_one_job(rig: Rig) -> None:
    with ThreadPoolExecutor(10) as pool:
        jobs = list(pool.map(lambda _: rig.submit("same", idempotency_key="k"), range(50)))
    assert len({job.id for job in jobs}) == 1
    with pytest.raises(IdempotencyConflict):
        rig.submit("another", idempotency_key="k")
    rig.start_worker()
    rig.all_succeed(jobs[:1])


def test_a_cancelled_job_never_runs_even_after_its_worker_was_killed(rig: Rig) -> None:
    worker = rig.start_worker()
    running = rig.submit("sleep 30")
    wait_until(lambda: rig.running() == 1, "the job to run")
    queued = rig.submit("sleep 0", priority="low")
    assert running.cancel()
    assert queued.cancel() or queued.info().ended
    assert running.status() is Status.CANCELLED
    assert not running.cancel()
    rig.kill(worker)
    rig.start_worker()
    rig.all_succeed([rig.submit("next")])
    with pytest.raises(JobCancelled):
        running.result(1)


def test_a_cancel_takes_effect_at_once_at_every_stage(rig: Rig) -> None:
    worker = rig.start_worker(max_batch_size=4)
    running = rig.submit("sleep 3")
    wait_until(lambda: "'sleep 3'" in worker.last_words(100), "the job to run")
    waiting = rig.submit("waiting")
    fetching = rig.client.caption(rig.upload("drip"), "fetching")
    wait_until(lambda: rig.running() == 3, "all to be at their stage")
    queued = rig.submit_all(["queued"] * 20)[-1]
    for job in (fetching, waiting, running, queued):
        assert job.cancel()
        assert job.status() is Status.CANCELLED
    ended = rig.submit("last")
    rig.all_succeed([ended])
    assert not ended.cancel()
    assert ended.status() is Status.SUCCEEDED
    assert all(job.status() is Status.CANCELLED for job in (fetching, waiting, running, queued))
    log = worker.last_words(1000)
    assert "'sleep 3'" in log
    assert "'waiting'" not in log
    assert "'fetching'" not in log


def hearing(rig: Rig) -> Service:
    """A worker that hears of revokes: it is registered some time before."""
    worker = rig.start_worker()
    wait_until(lambda: "ready after" in worker.last_words(100), "the worker's control queue")
    return worker


@pytest.mark.parametrize("terminate", [False, True])
def test_a_job_revoked_by_celery_is_cancelled_for_good(rig: Rig, terminate: bool) -> None:
    """``celery control revoke`` and Flower: once the job stayed queued, and ran after a restart."""
    worker = rig.start_worker(max_batch_size=1)
    running = rig.submit_all(["sleep 4"] * 2)
    wait_until(lambda: rig.running() == 2, "a full worker")
    queued = rig.submit("queued")
    control = rig.client.broker.app.control
    control.revoke([running[0].id, queued.id, "no_job"], terminate=terminate)
    wait_until(lambda: queued.info().ended and running[0].info().ended, "the revoke", 10)
    assert (queued.status(), running[0].status()) == (Status.CANCELLED, Status.CANCELLED)
    rig.all_succeed([running[1], rig.submit("next")])
    assert worker.exit_code is None
    rig.kill(worker)
    rig.start_worker()
    rig.all_succeed([rig.submit("after")])
    assert "'queued'" not in "".join(each.last_words(1000) for each in rig.workers)


def test_a_whole_job_revoked_before_it_came_is_cancelled(rig: Rig) -> None:
    """Its record is made when its message comes, and its message has an id of its own."""
    worker = hearing(rig)
    app = rig.client.broker.app
    app.control.revoke("task_1")
    wait_until(lambda: "task_1" in worker.last_words(100), "the revoke")
    request = {"image": rig.image.uri, "prompt": "revoked"}
    app.send_task(
        "blipq.caption",
        args=["job_sent", request],
        task_id="task_1",
        queue="blipq.default.normal",
        ignore_result=True,
    )
    wait_until(lambda: rig.client.ledger.read("job_sent"), "its record")
    assert rig.client.job("job_sent").wait(10).status is Status.CANCELLED


def test_a_dead_letter_that_was_revoked_runs_when_it_is_retried(rig: Rig) -> None:
    """Its worker once remembered the revoke, and cancelled it."""
    ledger = ledger_of(rig.client)
    broker = rig.client.broker
    job = rig.submit("fine")
    claim = ledger.claim(job.id, "killed")
    assert isinstance(claim, Claim)
    error = JobError(code=ErrorCode.ATTEMPTS_EXHAUSTED, message="died three times")
    assert ledger.fail(claim, error.model_dump_json(), "{}", dead=True)
    worker = hearing(rig)
    broker.app.control.revoke(job.id)
    wait_until(lambda: f"{job.id}: revoked" in worker.last_words(100), "the revoke")
    message = rig.operator.retry_dead_letter(job.id)
    assert message is not None
    broker.publish(message)
    rig.all_succeed([job])


def test_remote_control_that_would_change_what_a_worker_runs_is_refused(rig: Rig) -> None:
    """Celery failed, or said that all was well and left a worker that took no more jobs."""
    worker = rig.start_worker()
    running = rig.submit("sleep 2")
    wait_until(lambda: rig.running() == 1, "the job")
    control = rig.client.broker.app.control
    queue, task = "blipq.default.normal", "blipq.caption"
    stamps = {"headers": {"batch": "b"}, "terminate": True}
    for command, arguments, told in (
        ("revoke_by_stamped_headers", stamps, "blipq cancel"),
        ("rate_limit", {"task_name": task, "rate_limit": "1/h"}, "as fast as"),
        ("time_limit", {"task_name": task, "hard": 0.1}, "BLIPQ_JOB_TIMEOUT_S"),
        ("pool_grow", {"n": 4}, "BLIPQ_CONCURRENCY"),
        ("pool_shrink", {"n": 4}, "BLIPQ_CONCURRENCY"),
        ("autoscale", {"max": 1, "min": 1}, "BLIPQ_CONCURRENCY"),
        ("pool_restart", {}, "SIGTERM"),
        ("add_consumer", {"queue": "blipq.other.normal"}, "BLIPQ_MODELS"),
        ("cancel_consumer", {"queue": queue}, "BLIPQ_MODELS"),
        ("report", {}, "blipq doctor"),
    ):
        answers = control.broadcast(command, arguments, reply=True, timeout=10, limit=1)
        (answer,) = answers[0].values()
        assert told in answer["error"], command
    (conf,) = control.inspect(timeout=10, limit=1).conf().values()
    assert conf["task_acks_late"]
    assert not [name for name in conf if name.startswith("broker_")], "it has its password"
    inspect = control.inspect(timeout=10, limit=1)
    looks = ("ping", "active", "reserved", "scheduled", "revoked", "registered", "active_queues")
    for command in (*looks, "clock", "memsample"):
        (told,) = getattr(inspect, command)().values()
        assert "error" not in (told or ()), command
    (stats,) = inspect.stats().values()
    assert stats["broker"]["transport"] == "redis"
    assert not stats["broker"].keys() & {"alternates", "transport_options"}, "with its password"
    rig.all_succeed([running, rig.submit("after")])
    assert "Traceback" not in worker.last_words(1000)


def test_a_message_that_had_expired_ends_no_later_one_of_its_id(rig: Rig) -> None:
    """Celery revokes an id to drop an expired message: once its next job was cancelled for good."""
    worker = rig.start_worker()

    def send(id: str, job: str, **headers: str) -> None:
        arguments = [job, {"image": rig.image.uri, "prompt": "fine"}]
        named = {"task": "blipq.caption", "id": id} | headers
        rig.send(named, json.dumps([arguments, {}, {}]))
        wait_until(lambda: rig.client.ledger.read(job), "its record", 20)

    send("task_1", "job_late", expires="2020-01-01T00:00:00+00:00")
    assert rig.client.job("job_late").wait(10).status is Status.EXPIRED
    send("task_1", "job_next")
    assert rig.client.job("job_next").wait(20).status is Status.SUCCEEDED
    assert worker.exit_code is None


def test_a_clock_that_jumps_an_hour_costs_no_lease(rig: Rig) -> None:
    """Leases and deadlines are counted on Redis' clock."""
    worker = rig.start_worker()
    rig.submit("clock 3600").result(20)
    long = rig.submit(f"sleep {LEASE_S * 2}", expires_in=600)
    short = rig.submit_all(["sleep 0.1"] * 20, expires_in=600)
    rig.all_succeed([long, *short], timeout=20 * LEASE_S)
    assert {job.info().attempts for job in (long, *short)} == {1}
    assert worker.exit_code is None


def test_an_expired_job_is_settled_with_no_worker_and_never_downloaded(rig: Rig) -> None:
    missing = "s3://blipq-inbox/nothing-is-here"
    job = rig.client.caption(missing, expires_in=0.3)
    wait_until(lambda: job.info().ended, "the deadline")
    assert job.status() is Status.EXPIRED
    rig.start_worker()
    rig.all_succeed([rig.submit("after")])
    info = job.info()
    assert (info.status, info.attempts) == (Status.EXPIRED, 0)


def test_a_deadline_that_passes_while_a_job_runs_ends_it(rig: Rig) -> None:
    rig.start_worker()
    job = rig.submit("sleep 3", expires_in=1)
    assert job.wait(20).status is Status.EXPIRED


def test_the_next_worker_reconciles_when_the_one_that_did_is_killed(rig: Rig) -> None:
    first = rig.start_worker()
    wait_until(lambda: rig.redis(lambda raw: raw.get("blipq:reconciler")), "a reconciler")
    second = rig.start_worker()
    rig.kill(first)
    request = CaptionRequest(image=rig.image, prompt="lost")
    rig.client.ledger.submit(Submission(request, id="job_lost"), notify="x")
    assert rig.client.job("job_lost").wait(30).status is Status.SUCCEEDED
    assert second.exit_code is None


def test_high_priority_is_not_behind_a_thousand_low_jobs(rig: Rig) -> None:
    low = rig.submit_all(["sleep 0.005"] * 1000, priority=Priority.LOW)
    rig.start_worker(max_batch_size=8)
    wait_until(lambda: rig.running() >= 4, "a busy worker")
    high = rig.submit_all(["high"] * 10, priority=Priority.HIGH)
    rig.all_succeed(high, timeout=10)
    assert not rig.has_at_most(500), "the low jobs were still waiting when the high ones were done"
    rig.all_succeed(low, timeout=90)


def test_high_priority_starts_two_batches_after_ten_thousand_low_jobs_at_most(rig: Rig) -> None:
    size = WorkerSettings().max_batch_size
    low = rig.client.submit_many(
        [CaptionRequest(image=rig.image, prompt=f"number {n}") for n in range(10_000)],
        Options(priority=Priority.LOW),
    )
    rig.start_demo_worker()
    wait_until(lambda: rig.has_at_most(9_950), "low jobs that ended")
    high = rig.submit_all([f"high {n}" for n in range(10)], priority=Priority.HIGH)
    rig.all_succeed(high)
    wait_until(lambda: rig.has_at_most(9_800), "low jobs that go on")
    first = [job.info() for job in low[:1_000]]
    ended = sorted(info.completed_at for info in first if info.completed_at)
    assert len(ended) < len(first), "these were not all the low jobs that had ended"
    for info in (job.info() for job in high):
        assert info.started_at
        before = [at for at in ended if info.created_at < at < info.started_at]
        waited = (info.started_at - info.created_at).total_seconds()
        print(f"started after {waited:.3f} s and {len(before)} low jobs")  # shown with -s
        assert len(before) <= 2 * size


def test_malformed_messages_leave_the_worker_alive(rig: Rig) -> None:
    worker = rig.start_worker()
    app = rig.client.broker.app
    queue = "blipq.default.normal"
    app.send_task("blipq.nonsense", args=["x"], queue=queue)
    app.send_task("blipq.caption", args=[], queue=queue)
    app.send_task("blipq.caption", args=["job_bad", {"image": 7}], queue=queue)
    app.send_task("blipq.caption", args=["job_odd", "text"], queue=queue)
    for junk in (b"not a message", b"7", b"{}", b'{"properties": {}}', b"\x80\x04\x95pickle"):
        rig.put(queue, junk)
    rig.all_succeed([rig.submit("fine")])
    for id in ("job_bad", "job_odd"):
        error = rig.client.job(id).wait(10).error
        assert error is not None
        assert error.code is ErrorCode.INVALID_REQUEST
    assert worker.exit_code is None


MALFORMED = {
    "two parts": ({}, [["job", {}], {}]),
    "four parts": ({}, [["job", {}], {}, {}, {}]),
    "object": ({}, {"id": "job"}),
    "arguments": ({}, [["job", {}], None, {}]),
    "no task": ({"task": "nope"}, [["job"], {}, {}]),
    "task list": ({"task": ["x"]}, [["job"], {}, {}]),
    "id object": ({"id": {"a": 1}}, [["job"], {}, {}]),
    "time limit": ({"timelimit": 5}, [["job"], {}, {}]),
    "eta": ({"eta": "tomorrow"}, [["job"], {}, {}]),
    "expires": ({"expires": {"a": 1}}, [["job"], {}, {}]),
    "stamps": ({"stamped_headers": ["x"], "stamps": {}}, [["job"], {}, {}]),
    "chain": ({}, [["job"], {}, {"chain": 5, "chord": 5, "callbacks": 5}]),
}


def test_no_malformed_message_ends_or_holds_up_a_worker(rig: Rig) -> None:
    """Each of these once ended every worker in turn, or kept a place of it for ever."""
    worker = rig.start_worker(max_batch_size=2)  # four places: fewer than there are messages
    for name, (headers, body) in MALFORMED.items():
        headers = {"task": "blipq.caption", "id": f"job {name}"} | headers
        rig.send(headers, json.dumps(body).replace('"job"', f'"job {name}"'))
    for text in ("", "null", "[]", "hello", "[" * 50_000 + "]" * 50_000, "1" * 5_000):
        rig.send({"task": "blipq.caption", "id": "job unreadable"}, text)
        rig.send({}, text)
    rig.all_succeed(rig.submit_all(["fine"] * 8))
    for name in (*MALFORMED, "unreadable"):
        error = rig.client.job(f"job {name}").wait(10).error
        assert error is not None
        assert error.code is ErrorCode.INVALID_REQUEST
    assert worker.exit_code is None


AFTERWARDS = ({"chain": [{}]}, {"callbacks": [{}]}, {"errbacks": [{}]}, {"chord": {}})


def test_nothing_that_celery_would_do_after_a_job_holds_up_a_worker(rig: Rig) -> None:
    """It once kept a place of the worker for each such message, until it took no more."""
    worker = rig.start_worker(max_batch_size=2)  # four places: fewer than there are messages
    ends = {"fine": Status.SUCCEEDED, "raise": Status.FAILED}
    sent = [(f"job {i} {end}", end, each) for i, each in enumerate(AFTERWARDS * 2) for end in ends]
    for id, end, embed in sent:
        request = {"image": rig.image.uri, "prompt": end}
        headers = {"task": "blipq.caption", "id": id, "group": "g"}
        rig.send(headers, json.dumps([[id, request], {}, embed]))
    for id, end, _ in sent:
        wait_until(lambda id=id: rig.client.ledger.read(id), "its record", 20)
        assert rig.client.job(id).wait(20).status is ends[end]
    rig.all_succeed(rig.submit_all(["fine"] * 8))
    assert worker.exit_code is None


@pytest.mark.skipif(BROKER != "redis", reason="what lies in a list of Redis")
def test_what_is_no_message_in_a_list_of_redis_is_refused(rig: Rig) -> None:
    worker = rig.start_worker(max_batch_size=2)
    whole = {
        "headers": {"task": "blipq.caption", "id": "job"},
        "properties": {"delivery_tag": "t", "delivery_info": {}},
        "body": "[]",
    }
    broken = (
        {"headers": [1]},
        {"headers": None},
        {"headers": {"x": json.loads("[" * 500 + "]" * 500)}},
        {"body": {"a": 1}},
        {"properties": [1]},
        {"properties": {"delivery_info": {}, "delivery_tag": {"a": 1}}},
        {"properties": {"delivery_info": "x", "delivery_tag": "t"}},
        {"properties": whole["properties"] | {"body_encoding": "base64"}, "body": "%%%"},
        {"properties": whole["properties"] | {"body_encoding": "rot13"}},
        {"content-type": 5},
        {"content-encoding": "klingon"},
        {"content-type": "\ud800"},
        {"headers": whole["headers"] | {"blipq-refused": "\ud800"}},
    )
    for number, parts in enumerate(broken):
        text = json.dumps(whole | {"body": json.dumps([[f"job_{number}"], {}, {}])} | parts)
        rig.put("blipq.default.normal", text.encode())
    for junk in (b"[1, 2]", b"7", b"null", b"[" * 100_000):
        rig.put("blipq.default.normal", junk)
    for text in ("", "x", "[1]", "{}", "null", json.dumps(whole), json.dumps(whole | broken[0])):
        rig.redis(lambda raw, text=text: raw.publish("/0.celery.pidbox", text))
    rig.all_succeed(rig.submit_all(["fine"] * 8))
    assert rig.client.broker.app.control.ping(timeout=3), "it hears no remote control any more"
    for number, parts in enumerate(broken):
        id = "job" if "body" in parts else f"job_{number}"  # the headers' where the body says none
        assert rig.client.job(id).wait(10).status is Status.FAILED
    assert worker.exit_code is None


def test_a_submit_that_meets_no_redis_can_be_repeated_with_its_id(rig: Rig) -> None:
    rig.kill_redis()
    with pytest.raises(QueueUnavailable) as raised:
        rig.submit("again")
    assert raised.value.job_id is not None
    rig.start_redis()
    request = CaptionRequest(image=rig.image, prompt="again")
    job = rig.client.submit(request, id=raised.value.job_id)
    rig.start_worker()
    rig.all_succeed([job])


def test_waiting_in_many_threads_needs_one_subscription(rig: Rig) -> None:
    rig.start_worker()
    jobs = rig.submit_all(["sleep 0.1"] * 20)
    with Client(rig.settings) as other, ThreadPoolExecutor(20) as pool:
        waiting = [pool.submit(other.job(job.id).wait, 30) for job in jobs]
        subscribed = rig.redis(lambda raw: len(raw.client_list(_type="pubsub")))
        assert subscribed <= 4  # this client's, the other's and Celery's own
        assert all(each.result().status is Status.SUCCEEDED for each in waiting)
    assert threading.active_count() < 40


def test_a_long_batch_that_makes_progress_is_not_taken_for_a_hung_one(rig: Rig) -> None:
    """The watchdog once counted from the start of the batch."""
    worker = rig.start_worker(watchdog_s=1.5)
    rig.all_succeed([rig.submit("steps 20")], timeout=30)
    assert worker.exit_code is None
