"""Faults 12-18: Redis is killed, frozen, emptied, full, or answers with errors."""

import asyncio
import json
import re
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import redis

from blipq import (
    AsyncClient,
    CaptionRequest,
    JobNotFound,
    QueueFull,
    QueueUnavailable,
    Status,
)
from blipq.client.submitting import MAX_JOBS
from blipq.local.stack import free_port
from conftest import wait_until
from guarantees.rig import LEASE_S, Rig, both_forms

#: Jobs of clients that submit and await many.
COUNT = 3 * MAX_JOBS
AWAY_S = 5.0


def test_an_idle_worker_works_again_after_redis_was_away(rig: Rig) -> None:
    worker = rig.start_worker()
    rig.kill_redis()
    time.sleep(5)
    rig.start_redis()
    rig.all_succeed([rig.submit("hello")], timeout=20)
    assert worker.exit_code is None


@both_forms
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


@contextmanager
def too_few_replicas(rig: Rig) -> Iterator[None]:
    rig.redis(lambda raw: raw.config_set("min-replicas-to-write", 1))
    yield
    rig.redis(lambda raw: raw.config_set("min-replicas-to-write", 0))


@contextmanager
def demoted(rig: Rig) -> Iterator[None]:
    """As in a planned failover; blocked clients are sent UNBLOCKED."""
    rig.redis(lambda raw: raw.execute_command("REPLICAOF", "127.0.0.1", "1"))
    yield
    rig.redis(lambda raw: raw.execute_command("REPLICAOF", "NO", "ONE"))


@contextmanager
def busy(rig: Rig) -> Iterator[None]:
    """Another program's script takes long."""
    rig.redis(lambda raw: raw.config_set("busy-reply-threshold", 100))
    script = threading.Thread(target=_hog, args=(rig,))
    script.start()
    yield
    script.join()


def _hog(rig: Rig) -> None:
    text = "local t = redis.call('TIME')[1] while redis.call('TIME')[1] - t < 6 do end"
    with redis.Redis.from_url(rig.settings.redis_url, socket_timeout=60) as raw:
        raw.eval(text, 0)


def readiness(port: int) -> dict[str, str]:
    """What /readyz finds wrong."""
    url = f"http://127.0.0.1:{port}/readyz"
    try:
        urllib.request.urlopen(url, timeout=20).close()
    except urllib.error.HTTPError as unready:
        with unready:
            found: dict[str, str] = json.load(unready)
            return {name: problem for name, problem in found.items() if problem != "ok"}
    return {}


@pytest.mark.parametrize("refusal", [too_few_replicas, demoted, busy])
def test_a_worker_outlives_a_redis_that_refuses_and_loses_no_result(
    rig: Rig, refusal: Callable[[Rig], Any]
) -> None:
    """Idle workers once exited, and full ones took no more jobs, but looked well."""
    ports = free_port(), free_port()
    full = rig.start_worker(max_batch_size=1, health_port=ports[0])
    jobs = rig.submit_all(["sleep 2.5", "sleep 2.6"])
    wait_until(lambda: rig.running() == 2, "a full worker")
    idle = rig.start_worker(max_batch_size=1, health_port=ports[1])
    with refusal(rig):
        wait_until(lambda: all("redis" in readiness(port) for port in ports), "both to say so")
        time.sleep(4)  # the jobs end meanwhile
    rig.all_succeed(jobs, timeout=30)
    assert {job.info().attempts for job in jobs} == {1}
    wait_until(lambda: not any(readiness(port) for port in ports), "both to be ready", 60)
    rig.kill(idle)
    rig.all_succeed(rig.submit_all(["next"] * 8), timeout=30)  # by the one that was full
    assert full.exit_code is None


@both_forms
def test_an_outage_longer_than_any_lease_is_no_crash_of_the_jobs_that_end_in_it(rig: Rig) -> None:
    worker = rig.start_worker(max_batch_size=8)
    jobs = rig.submit_all([f"sleep {1 + n / 100}" for n in range(8)])
    wait_until(lambda: rig.running() == 8, "all to run")
    server = rig.stack.services[0]
    server.signal(signal.SIGSTOP)
    time.sleep(3 * LEASE_S)
    server.signal(signal.SIGCONT)
    rig.all_succeed(jobs, timeout=40)
    assert {job.info().attempts for job in jobs} == {1}
    assert worker.exit_code is None


def test_a_backlog_is_not_published_again(rig: Rig) -> None:
    """A free thread now and then was once taken for an idle worker, and Redis was flooded."""
    jobs = rig.submit_all(["sleep 0.1"] * 150)
    worker = rig.start_worker(max_batch_size=1)
    rig.all_succeed(jobs, timeout=90)
    again = re.findall(r"published again: (\d+)", worker.last_words(10_000))
    assert sum(map(int, again)) <= 1


# -- under clients that submit and await many jobs --


def with_an_outage(rig: Rig) -> Iterator[CaptionRequest]:
    """Requests, while Redis dies in the middle and comes back."""

    def come_back() -> None:
        time.sleep(AWAY_S)
        rig.start_redis()
        time.sleep(300)  # the server ends with the thread that started it

    for number in range(COUNT):
        if number == MAX_JOBS + MAX_JOBS // 2:
            rig.kill_redis()
            threading.Thread(target=come_back, daemon=True).start()
        yield CaptionRequest(image=rig.image, prompt=f"job {number}")


def recorded(rig: Rig) -> int:
    return rig.redis(lambda raw: sum(1 for _ in raw.scan_iter("blipq:job:*", count=1000)))


def test_many_are_submitted_once_each_through_an_outage_of_redis(rig: Rig) -> None:
    rig.start_worker()
    jobs = rig.client.submit_many(with_an_outage(rig), timeout=60)
    ended = rig.client.wait_all(jobs, timeout=120)
    assert {job.status() for job in ended} == {Status.SUCCEEDED}
    texts = [job.result().text for job in ended]
    assert texts == [f"did job {number}" for number in range(COUNT)]
    assert recorded(rig) == COUNT


def test_an_event_loop_submits_and_awaits_many_through_an_outage_of_redis(rig: Rig) -> None:
    rig.start_worker()

    async def main() -> list[str]:
        async with AsyncClient(rig.settings) as client:
            jobs = await client.submit_many(with_an_outage(rig), timeout=60)
            results = await asyncio.gather(*[job.result(timeout=120) for job in jobs])
            return [result.text for result in results]

    assert asyncio.run(main()) == [f"did job {number}" for number in range(COUNT)]
    assert recorded(rig) == COUNT


def test_waits_for_many_outlive_an_outage_of_redis(rig: Rig) -> None:
    jobs = rig.client.submit_many(
        CaptionRequest(image=rig.image, prompt=f"job {number}") for number in range(100)
    )
    ended: list[str] = []
    waiting = threading.Thread(
        target=lambda: ended.extend(job.id for job in rig.client.as_completed(jobs, timeout=120))
    )
    waiting.start()
    rig.kill_redis()
    time.sleep(AWAY_S)
    rig.start_redis()
    rig.start_worker()
    waiting.join()
    assert set(ended) == {job.id for job in jobs}
