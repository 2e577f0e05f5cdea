"""Faults 5, 6 and 37: a worker is told to stop, or another version comes."""

import hashlib
import signal
import time
from typing import Any

import pytest

from blipq import Job, Status
from blipq.ledger import codec as records
from blipq.ledger.scripts.runner import script_text
from blipq_worker.process.signals import ECHO_S
from conftest import wait_until
from guarantees.rig import Rig, both_forms
from guarantees.stand_ins.muted_redis import muted_redis


@both_forms
def test_a_stopping_worker_finishes_what_runs_and_leaves_the_rest_in_the_queue(rig: Rig) -> None:
    worker = rig.start_worker(max_batch_size=4)
    jobs = rig.submit_all(["sleep 0.2"] * 20)
    wait_until(lambda: rig.running() == 8, "a full worker")
    worker.signal(signal.SIGTERM)
    rig.wait_for_death(worker, 30)
    assert worker.exit_code == 0
    infos = [job.info() for job in jobs]
    assert {info.status for info in infos} == {Status.SUCCEEDED, Status.QUEUED}
    assert rig.running() == 0
    assert all(info.attempts == 0 for info in infos if info.status is Status.QUEUED)
    rig.start_worker()
    rig.all_succeed(jobs)


def test_what_outlasts_the_drain_deadline_is_handed_back_uncounted(rig: Rig) -> None:
    worker = rig.start_worker(drain_timeout_s=1)
    job = rig.submit("sleep 6")
    wait_until(lambda: rig.running() == 1, "the job to run")
    worker.signal(signal.SIGTERM)
    rig.wait_for_death(worker, 10)
    assert worker.exit_code == 0
    info = job.info()
    assert (info.status, info.attempts) == (Status.QUEUED, 0)
    rig.start_worker()
    assert job.wait(30).attempts == 1


def test_a_second_signal_ends_the_worker_at_once_and_loses_nothing(rig: Rig) -> None:
    worker = rig.start_worker(drain_timeout_s=60)
    job = rig.submit("sleep 8")
    wait_until(lambda: rig.running() == 1, "the job to run")
    worker.signal(signal.SIGTERM)
    wait_until(lambda: "draining" in worker.last_words(), "the drain to begin")
    time.sleep(ECHO_S)
    worker.signal(signal.SIGTERM)
    rig.wait_for_death(worker, 5)
    rig.start_worker()
    rig.all_succeed([job])


def test_a_worker_that_is_told_by_two_at_once_drains(rig: Rig) -> None:
    """By systemd, which signals all of a unit, and by the supervisor that it signals, too."""
    worker = rig.start_worker(drain_timeout_s=60)
    job = rig.submit("sleep 3")
    wait_until(lambda: rig.running() == 1, "the job to run")
    worker.signal(signal.SIGTERM)
    wait_until(lambda: "draining" in worker.last_words(), "the drain to begin")
    worker.signal(signal.SIGTERM)
    rig.wait_for_death(worker, 30)
    assert (job.info().status, job.info().attempts) == (Status.SUCCEEDED, 1)


def test_a_worker_killed_while_it_drains_leaves_its_jobs_to_the_next(rig: Rig) -> None:
    worker = rig.start_worker(drain_timeout_s=60)
    job = rig.submit("sleep 4")
    wait_until(lambda: rig.running() == 1, "the job to run")
    worker.signal(signal.SIGTERM)
    rig.kill(worker)
    rig.start_worker()
    info = job.wait(40)
    assert (info.status, info.attempts) == (Status.SUCCEEDED, 2)


def test_a_claim_whose_answer_is_lost_while_the_worker_drains_is_no_crash(rig: Rig) -> None:
    """Its message went back, and the lease that nobody knew of ran out: that counted."""
    claim = hashlib.sha1(script_text("claim").encode()).hexdigest()
    with muted_redis(rig.settings.redis_url) as muted:
        worker = rig.start_worker(redis_url=muted.url, timeout_s=1)
        rig.all_succeed([rig.submit("before")])
        muted.lost = claim.encode()
        job = rig.submit("unheard")
        wait_until(lambda: rig.running() == 1, "the claim")
        worker.signal(signal.SIGTERM)
        rig.wait_for_death(worker, 30)
    assert worker.exit_code == 0
    assert (job.info().status, job.info().attempts) == (Status.QUEUED, 0)
    assert rig.running() == 0
    rig.start_worker()
    assert job.wait(30).attempts == 1


def test_a_job_with_a_newer_contract_waits_for_a_newer_worker(rig: Rig) -> None:
    """It once ended the worker: giving the message back went through a broken path."""
    newer = rig.submit("newer")
    rig.redis(lambda raw: raw.hset(f"blipq:job:{newer.id}", "contract", 99))
    old = rig.start_worker()
    rig.all_succeed(rig.submit_all(["known"] * 5))
    wait_until(lambda: "newer than this" in old.last_words(50), "the worker to meet it")
    rig.all_succeed(rig.submit_all(["known"] * 5))
    assert (newer.info().status, newer.info().attempts) == (Status.QUEUED, 0)
    assert old.exit_code is None
    rig.redis(lambda raw: raw.hset(f"blipq:job:{newer.id}", "contract", 1))  # its worker comes
    rig.all_succeed([newer], timeout=30)


@pytest.mark.parametrize("first", ["workers", "clients"])
def test_a_rolling_deploy_under_load_loses_and_fails_no_job(
    rig: Rig, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deploy_clients() -> list[Job[Any]]:
        monkeypatch.setattr(records, "contract_of", lambda request, options: 2)
        return rig.submit_all(["sleep 0.05"] * 40)

    old = [rig.start_worker(contract=1) for _ in range(2)]
    jobs = rig.submit_all(["sleep 0.05"] * 40)
    if first == "clients":
        jobs += deploy_clients()
    for worker in old:
        rig.start_worker(contract=2)
        jobs += rig.submit_all(["sleep 0.05"] * 20)
        worker.signal(signal.SIGTERM)
        jobs += rig.submit_all(["sleep 0.05"] * 20)
        rig.wait_for_death(worker)
        assert worker.exit_code == 0
    if first == "workers":
        jobs += deploy_clients()
    rig.all_succeed(jobs, timeout=60)
    assert {job.info().attempts for job in jobs} == {1}, "no job began twice"


def test_a_worker_that_is_shut_down_by_remote_control_drains(rig: Rig) -> None:
    """It once looked as if it served its models until its last job had ended."""
    worker = rig.start_worker()
    job = rig.submit("sleep 4")
    wait_until(lambda: rig.running() == 1, "the job to run")
    rig.client.broker.app.control.shutdown()
    wait_until(lambda: job.info().live_workers == 0, "the worker to serve no more")
    assert worker.exit_code is None
    rig.all_succeed([job])
    rig.wait_for_death(worker)
    assert worker.exit_code == 0
