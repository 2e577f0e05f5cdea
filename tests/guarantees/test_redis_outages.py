"""Faults 12-18: Redis is killed, frozen, emptied or full."""

import signal
import time

import pytest

from blipq import JobNotFound, QueueFull, QueueUnavailable, Status
from conftest import wait_until
from guarantees.rig import Rig


def test_an_idle_worker_works_again_after_redis_was_away(rig: Rig) -> None:
    worker = rig.start_worker()
    rig.kill_redis()
    time.sleep(5)
    rig.start_redis()
    rig.all_succeed([rig.submit("hello")], timeout=20)
    assert worker.exit_code is None


def test_a_job_that_runs_while_redis_is_away_ends_with_one_result(rig: Rig) -> None:
    worker = rig.start_worker()
    job = rig.submit("sleep 3")
    wait_until(lambda: rig.running() == 1, "the job to run")
    rig.kill_redis()
    time.sleep(5)
    rig.start_redis()
    rig.all_succeed([job], timeout=40)
    assert worker.exit_code is None


def test_a_full_worker_and_its_backlog_survive_the_death_of_redis(rig: Rig) -> None:
    worker = rig.start_worker(max_batch_size=4)
    jobs = rig.submit_all(["sleep 0.1"] * 40)
    wait_until(lambda: rig.running() == 8, "a full worker")
    rig.kill_redis()
    rig.start_redis()
    rig.all_succeed(jobs, timeout=60)
    assert worker.exit_code is None


def test_after_redis_lost_its_data_old_ids_are_not_found_and_new_jobs_flow(rig: Rig) -> None:
    worker = rig.start_worker()
    old = rig.submit("sleep 1")
    rig.redis(lambda raw: raw.flushall())
    with pytest.raises(JobNotFound):
        old.info()
    rig.all_succeed([rig.submit("new")], timeout=30)
    assert worker.exit_code is None


def test_a_frozen_redis_makes_submit_say_so_and_the_worker_goes_on_after_it(rig: Rig) -> None:
    worker = rig.start_worker()
    rig.submit("warm").result(20)
    server = rig.stack.services[0]
    server.signal(signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(QueueUnavailable) as raised:
        rig.submit("frozen")
    assert time.monotonic() - started < 2 * rig.settings.timeout_s + 1
    assert raised.value.job_id
    time.sleep(10)
    server.signal(signal.SIGCONT)
    rig.all_succeed([rig.submit("thawed")], timeout=30)
    assert worker.exit_code is None


def test_a_full_redis_refuses_jobs_and_loses_none(rig: Rig) -> None:
    worker = rig.start_worker(max_batch_size=4)
    jobs = rig.submit_all(["sleep 0.2"] * 20)
    wait_until(lambda: rig.running() > 0, "the jobs to run")
    rig.redis(lambda raw: raw.config_set("maxmemory", 1))
    with pytest.raises(QueueFull):
        rig.submit("no room")
    time.sleep(3)
    rig.redis(lambda raw: raw.config_set("maxmemory", 0))
    rig.all_succeed(jobs, timeout=60)
    assert worker.exit_code is None


def test_cut_connections_lose_nothing(rig: Rig) -> None:
    worker = rig.start_worker(max_batch_size=4)
    jobs = rig.submit_all(["sleep 0.1"] * 20)
    wait_until(lambda: rig.running() > 0, "the jobs to run")
    for kind in ("normal", "pubsub"):
        rig.redis(lambda raw, kind=kind: raw.client_kill_filter(_type=kind, skipme=True))
    infos = rig.outcomes(jobs, timeout=60)
    assert {info.status for info in infos} == {Status.SUCCEEDED}
    assert max(info.attempts for info in infos) <= 2
    assert worker.exit_code is None
