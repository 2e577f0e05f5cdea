"""A device that is lost, and a model that has gone wrong, fail no jobs but their own."""

import signal
from functools import partial
from typing import Any

import httpx2

from blipq import ErrorCode, Job, Status
from blipq.local.stack import free_port
from blipq.local.supervisor import Service
from conftest import wait_until
from guarantees.rig import Rig


def test_a_worker_that_lost_its_device_ends_and_its_jobs_succeed_on_another(rig: Rig) -> None:
    """It would fail them within milliseconds, and so take more than any healthy worker."""
    healthy = rig.start_worker(max_batch_size=4)
    sick = rig.start_worker(device="lost", max_batch_size=4)
    jobs = rig.submit_all(["sleep 0.02"] * 200)
    rig.wait_for_death(sick)
    assert sick.exit_code == 70
    assert "the device is lost: CUDA error" in sick.last_words(1000)
    rig.all_succeed(jobs, timeout=90)
    assert healthy.exit_code is None
    assert {job.info().attempts for job in jobs} == {1}  # none of them was charged


def test_a_job_that_loses_the_device_again_and_again_is_charged_when_it_is_alone(rig: Rig) -> None:
    poison = rig.submit("lose-device")
    others = rig.submit_all(["sleep 0.05"] * 20)
    deaths = _restart_until_ended(rig, poison)
    info = poison.info()
    assert info.error is not None
    assert (info.status, info.error.code) == (Status.FAILED, ErrorCode.ATTEMPTS_EXHAUSTED)
    assert deaths <= 3  # once in company, for which nobody is charged, and twice alone
    assert [letter.id for letter in rig.operator.dead_letters()] == [poison.id]
    rig.start_worker()
    rig.all_succeed(others, timeout=60)


def _restart_until_ended(rig: Rig, job: Job[Any]) -> int:
    """Keeps a worker running, as a supervisor would, until the job ends; how many died."""
    deaths = 0
    worker = rig.launch_worker()

    def settled(worker: Service) -> bool:
        return worker.exit_code is not None or job.info().ended

    while True:
        wait_until(partial(settled, worker), "a death or the end", timeout=60)
        if job.info().ended:
            return deaths
        assert worker.exit_code == 70, worker.last_words(20)
        deaths += 1
        worker = rig.launch_worker()


def test_a_worker_whose_model_went_wrong_stops_taking_jobs_and_says_so(rig: Rig) -> None:
    port = free_port()
    sick = rig.start_worker(device="nonsense", health_port=port, max_batch_size=4)
    jobs = rig.submit_all(["job"] * 40)
    wait_until(lambda: "taking no more jobs" in sick.last_words(200), "the check")
    rig.start_worker()
    infos = rig.outcomes(jobs, timeout=60)
    failed = [info for info in infos if info.status is not Status.SUCCEEDED]
    assert len(failed) <= 3, failed  # the last of them may have been handed back in time
    assert {info.error.code for info in failed if info.error} == {ErrorCode.INTERNAL}
    assert sick.exit_code is None
    for probe in ("readyz", "healthz"):
        answer = httpx2.get(f"http://127.0.0.1:{port}/{probe}", timeout=5)
        assert answer.status_code == 503
        assert "model 'default' failed its check: probability" in answer.json()["model"]
    assert rig.running() == 0
    sick.signal(signal.SIGTERM)
    rig.wait_for_death(sick, timeout=20)
    assert sick.exit_code == 0


def test_jobs_that_fail_by_themselves_leave_a_healthy_model_at_work(rig: Rig) -> None:
    worker = rig.start_worker()
    bad = rig.submit_all(["raise"] * 8)
    assert {info.status for info in rig.outcomes(bad)} == {Status.FAILED}
    wait_until(lambda: "is well" in worker.last_words(10_000), "the check")
    rig.all_succeed(rig.submit_all(["job"] * 4))
