"""An operator pauses, moves and cancels jobs while workers run, die and come back."""

from blipq import JobFilter, Status
from conftest import wait_until
from guarantees.rig import Rig, png

QUEUE = "blipq.default.normal"


def test_jobs_of_a_paused_queue_wait_through_a_kill_and_all_succeed_when_it_is_resumed(
    rig: Rig,
) -> None:
    """Its workers have dropped their messages: nothing but the ledger knows of them."""
    worker = rig.start_worker(max_batch_size=2)
    runs = rig.submit("sleep 1")
    wait_until(lambda: rig.running() == 1, "the job to run")
    rig.client.pause(QUEUE)
    jobs = rig.submit_all(["sleep 0.05"] * 40)
    wait_until(lambda: rig.redis(lambda raw: raw.llen(QUEUE)) == 0, "the messages to be dropped")
    rig.all_succeed([runs])  # what ran has ended
    rig.kill(worker)
    rig.start_worker(max_batch_size=2)
    rig.all_succeed([rig.submit("another queue", priority="high")])
    infos = [job.info() for job in jobs]
    assert {(info.status, info.attempts) for info in infos} == {(Status.QUEUED, 0)}
    assert infos[0].note == f"the queue {QUEUE} is paused"
    rig.client.resume(QUEUE)
    rig.all_succeed(jobs)
    assert {job.info().attempts for job in jobs} == {1}


def test_jobs_are_moved_and_cancelled_beside_a_worker_that_takes_them(rig: Rig) -> None:
    rig.start_worker(max_batch_size=2)
    jobs = rig.submit_all(["sleep 0.05"] * 60, priority="low", metadata={"batch": "a"})
    others = rig.submit_all(["sleep 0.05"] * 20, priority="low", metadata={"batch": "b"})
    rig.client.expedite(JobFilter(metadata={"batch": "a"}))
    cancelled = rig.client.cancel_all(JobFilter(metadata={"batch": "b"}))
    statuses = [info.status for info in rig.outcomes(others)]
    assert statuses.count(Status.CANCELLED) == cancelled
    assert set(statuses) <= {Status.CANCELLED, Status.SUCCEEDED}
    rig.all_succeed(jobs)


def test_a_job_that_is_erased_while_it_runs_leaves_nothing_behind(rig: Rig) -> None:
    worker = rig.start_worker(max_batch_size=2)
    job = rig.submit("sleep 2", metadata={"user": "42"}, idempotency_key="key-of-42")
    wait_until(lambda: rig.running() == 1, "the job to run")
    queued = rig.submit_all(["sleep 2"] * 8, metadata={"user": "42"}, priority="low")
    report = rig.client.forget(JobFilter(metadata={"user": "42"}))
    assert set(report.jobs) == {job.id, *(each.id for each in queued)}
    assert report.objects == [rig.image.uri]  # nobody else names it
    rig.image = rig.client.storage.upload(png())
    rig.all_succeed([rig.submit("after it")])
    assert worker.exit_code is None
    assert rig.client.count(JobFilter(metadata={"user": "42"})) == 0
    assert rig.redis(lambda raw: raw.exists("blipq:idempotency:key-of-42")) == 0
    assert job.info().attempts == 0  # what stays of it has no content
    assert job.info().receipt is None
