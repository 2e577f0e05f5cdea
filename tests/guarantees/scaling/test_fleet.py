"""``blipq worker --processes``: several workers under one supervisor."""

import os
import signal
import sys
from pathlib import Path

import psutil
import pytest

from blipq import Status
from blipq.local.supervisor import Service
from conftest import wait_until
from guarantees.rig import Rig, named


def test_processes_share_the_cores_and_a_killed_one_is_started_again(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    fleet = _fleet(rig, "--processes", "2")
    try:
        wait_until(lambda: len(rig.operator.workers()) == 2, "two workers", timeout=90)
        first, second = _workers(fleet)
        cores = len(os.sched_getaffinity(0))
        assert {each.environ()["OMP_NUM_THREADS"] for each in (first, second)} == {
            str(max(1, cores // 2))
        }
        jobs = rig.submit_all([f"a photo of number {number}" for number in range(64)])
        first.send_signal(signal.SIGKILL)
        rig.all_succeed(jobs, timeout=90)
        wait_until(lambda: len(_workers(fleet)) == 2, "another process")
        assert second in _workers(fleet)
        assert first not in _workers(fleet)
    finally:
        left = _workers(fleet)
        fleet.stop(timeout=30)
    assert fleet.exit_code == 0, fleet.last_words()
    assert not any(each.is_running() for each in left)


def test_sigterm_drains_every_process_of_a_fleet(rig: Rig) -> None:
    fleet = _fleet(rig, "--processes", "2")
    try:
        wait_until(lambda: len(rig.operator.workers()) == 2, "two workers", timeout=90)
        long = {"num_beams": 1, "min_new_tokens": 200, "max_new_tokens": 200}
        jobs = [rig.submit(f"a photo of number {number}", generation=long) for number in range(32)]
        wait_until(lambda: rig.running() == 32, "all jobs to run")
    finally:
        fleet.stop(timeout=60)
    assert fleet.exit_code == 0, fleet.last_words()
    assert "handed back" not in fleet.last_words(1_000)
    assert {job.info().status for job in jobs} == {Status.SUCCEEDED}


def _fleet(rig: Rig, *options: str) -> Service:
    settings = {"models": "default=demo", "lease_s": 3, "retry_backoff_s": 0.1}
    fleet = Service(
        "fleet",
        [sys.executable, "-m", "blipq", "worker", *options],
        env=rig.stack.environment() | named(settings),
        log=Path(rig.folder) / "fleet.log",
    )
    fleet.start()
    return fleet


def _workers(fleet: Service) -> list[psutil.Process]:
    return psutil.Process(fleet.pid).children()
