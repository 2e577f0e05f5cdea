"""A worker with fronts as it ships, with the demo model, while its processes die."""

import os
import signal
import time

import psutil

from blipq import Job, Status
from blipq.local.supervisor import Service
from blipq_worker.supervision.worker import PASSED_ON_S
from conftest import wait_until
from guarantees.fronts.parts import processes
from guarantees.rig import Rig

PROMPTS = [f"a photo of number {number}" for number in range(60)]


def start(rig: Rig) -> Service:
    """Leases outlast the test: nothing here comes back because one ran out."""
    options = {"fronts": 2, "dtype": "float32", "lease_s": 120, "health_port": 0}
    return rig.start_demo_worker(**options)


def wait_for_fronts(rig: Rig, worker: Service) -> None:
    def serves() -> bool:
        found = list(rig.operator.workers().values())
        return any(each["engine"] == "serving" and each["threads"] == 32 for each in found)

    wait_until(serves, "two fronts that serve", timeout=90)
    assert len(processes(worker, "front")) == 2


def kill(worker: Service, role: str) -> psutil.Process:
    victim = processes(worker, role)[0]
    victim.kill()
    return victim


def submitted(rig: Rig, name: str) -> list[Job[object]]:
    return rig.submit_all([f"{name}: {prompt}" for prompt in PROMPTS])


def test_jobs_outlive_fronts_and_engine_and_are_not_charged(rig: Rig) -> None:
    worker = start(rig)
    wait_for_fronts(rig, worker)
    engine = processes(worker, "engine")
    for number in range(3):
        jobs = submitted(rig, f"front {number}")
        wait_until(lambda: rig.running() > 8, "jobs that run")
        kill(worker, "front")
        rig.all_succeed(jobs, timeout=90)
        wait_for_fronts(rig, worker)
    assert processes(worker, "engine") == engine
    jobs = submitted(rig, "engine")
    wait_until(lambda: rig.running() > 8, "jobs that run")
    kill(worker, "engine")
    infos = rig.outcomes(jobs, timeout=120)
    assert {info.status for info in infos} == {Status.SUCCEEDED}
    assert {info.attempts for info in infos} == {1}


def test_a_drained_worker_with_fronts_hands_back_what_it_cannot_finish(rig: Rig) -> None:
    worker = start(rig)
    wait_for_fronts(rig, worker)
    parts = psutil.Process(worker.pid).children()
    long = {"num_beams": 1, "min_new_tokens": 200, "max_new_tokens": 200}
    jobs = [rig.submit(prompt, generation=long) for prompt in PROMPTS]
    wait_until(lambda: rig.running() >= 32, "jobs that run")
    worker.signal(signal.SIGTERM)
    wait_until(lambda: rig.running() < 32, "an end of the first jobs, or their return", timeout=100)
    time.sleep(PASSED_ON_S)  # what comes sooner is an echo
    worker.signal(signal.SIGTERM)  # hand back at once
    rig.wait_for_death(worker)
    assert worker.exit_code == 0, worker.last_words()
    assert not any(each.is_running() for each in parts)
    infos = [job.info() for job in jobs]
    assert {info.status for info in infos} <= {Status.SUCCEEDED, Status.QUEUED}
    assert {info.attempts for info in infos if info.status is Status.QUEUED} == {0}


def test_what_a_killed_main_process_leaves_the_next_worker_goes_on_with(rig: Rig) -> None:
    worker = start(rig)
    wait_for_fronts(rig, worker)
    parts = psutil.Process(worker.pid).children()
    jobs = submitted(rig, "main")
    wait_until(lambda: rig.running() > 8, "jobs that run")
    os.kill(worker.pid or 0, signal.SIGKILL)
    worker.wait(10)
    wait_until(lambda: not any(each.is_running() for each in parts), "their end", timeout=60)
    start(rig)
    infos = rig.outcomes(jobs, timeout=120)
    assert {info.status for info in infos} == {Status.SUCCEEDED}
    assert {info.attempts for info in infos} == {1}
