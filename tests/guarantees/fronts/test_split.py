"""A worker with fronts whose processes die, freeze and are sent garbage, at every step of a job.

Its leases outlast each test, where nothing else is said: what goes on was given back when its
process died.
"""

import os
import random
import signal
import socket
from pathlib import Path
from typing import Any

import psutil
import pytest

from blipq import ErrorCode, Job, JobInfo, Status
from blipq.local.supervisor import Service
from conftest import wait_until
from guarantees.fronts import parts
from guarantees.rig import LEASE_S, Rig, png
from guarantees.stand_ins import stops
from guarantees.stand_ins.faulty_worker import CRASHING_SIZE, HANGING_SIZE

pytestmark = [pytest.mark.parametrize("fronts", [2], ids=["2 fronts"]), pytest.mark.timeout(400)]

LONG_S = 300


def start(rig: Rig, **options: Any) -> Service:
    return rig.start_worker(lease_s=LONG_S, max_batch_size=16, **options)


def stopped_at(rig: Rig, steps: tuple[str, ...]) -> list[Job[Any]]:
    """One job for each step, stopped there. Once one is in the pass, the engine waits."""
    jobs = []
    for step in steps:
        stops.arm(rig.stops, step)
        jobs.append(rig.submit("stop" if step == "in the pass" else f"stops: {step}"))
        wait_until(lambda step=step: stops.reached(rig.stops, step), f"a job that is {step}", 60)
    return jobs


def unharmed(rig: Rig, jobs: list[Job[Any]], timeout: float = 120.0) -> list[JobInfo]:
    """All succeed, and none was charged."""
    infos = rig.outcomes(jobs, timeout)
    assert {info.status for info in infos} == {Status.SUCCEEDED}, infos
    assert {info.attempts for info in infos} == {1}, infos
    assert rig.operator.dead_letters() == []
    return infos


def die(processes: list[psutil.Process]) -> None:
    for each in processes:
        each.kill()
    wait_until(lambda: not any(map(parts.is_alive, processes)), "their death")


def test_jobs_of_killed_fronts_run_again_at_once_whatever_their_step(rig: Rig) -> None:
    worker = start(rig)
    engine = parts.processes(worker, "engine")
    jobs = stopped_at(rig, stops.IN_FRONTS)
    neighbours = rig.submit_all(["sleep 0.05"] * 20)
    die(parts.processes(worker, "front"))
    stops.let_go(rig.stops)
    unharmed(rig, jobs + neighbours)
    assert parts.processes(worker, "engine") == engine  # no weights were read again


def test_a_living_front_takes_the_jobs_of_a_dead_one(rig: Rig) -> None:
    worker = start(rig)
    jobs = stopped_at(rig, stops.IN_FRONTS[:-2])
    first, second = parts.processes(worker, "front")
    die([first])
    # Not two that take jobs: one that has the suspect takes no other until its own are done.
    wait_until(lambda: len(parts.processes(worker, "front")) == 2, "two fronts again")
    stops.let_go(rig.stops)
    unharmed(rig, jobs, timeout=30)
    assert parts.is_alive(second)


def test_jobs_of_a_killed_engine_go_back_uncharged_whatever_their_step(rig: Rig) -> None:
    worker = start(rig)
    jobs = stopped_at(rig, stops.STEPS)
    neighbours = rig.submit_all(["sleep 0.05"] * 20)
    die(parts.processes(worker, "engine"))
    stops.let_go(rig.stops)
    unharmed(rig, jobs + neighbours)


def test_jobs_of_a_killed_main_process_go_to_the_next_worker_whatever_their_step(
    rig: Rig,
) -> None:
    worker = start(rig, drain_timeout_s=2)
    left = parts.processes(worker, "front") + parts.processes(worker, "engine")
    folder = parts.run_folder(worker)
    jobs = stopped_at(rig, stops.STEPS)
    rig.kill(worker)
    wait_until(lambda: not any(map(parts.is_alive, left[:-1])), "the fronts' end", 60)
    stops.let_go(rig.stops)
    wait_until(lambda: not any(map(parts.is_alive, left)), "the engine's end", 60)
    start(rig)
    unharmed(rig, jobs)
    assert not folder.exists()


def test_jobs_of_a_worker_whose_processes_all_die_at_once_succeed_on_the_next(rig: Rig) -> None:
    """As a host ends that runs out of memory: their leases run out."""
    worker = rig.start_worker(max_batch_size=16)
    jobs = rig.submit_all(["sleep 0.05"] * 100)
    wait_until(lambda: rig.running() >= 32, "a full worker")
    every = [psutil.Process(worker.pid), *psutil.Process(worker.pid).children()]
    for each in every:
        each.suspend()  # so that none has time to give anything back
    for each in every:
        each.kill()
    rig.wait_for_death(worker)
    rig.start_worker(max_batch_size=16)
    rig.all_succeed(jobs, timeout=90)
    assert max(job.info().attempts for job in jobs) == 2


def test_one_killer_among_128_suspects_costs_few_reloads_and_no_other_job(rig: Rig) -> None:
    """Leases are short: it is charged when they run out, and that takes two times."""
    worker = rig.start_worker(max_batch_size=128, lease_s=LEASE_S)
    seen = set(parts.processes(worker, "engine"))
    blocker = stopped_at(rig, ("in the pass",))  # so that all others are in one pass
    jobs = [rig.submit("exit" if n == 77 else "fine") for n in range(128)]
    wait_until(lambda: rig.running() == 129, "all to wait for the engine")
    stops.let_go(rig.stops)

    def ended() -> bool:
        seen.update(parts.processes(worker, "engine"))
        return rig.has_at_most(0)

    wait_until(ended, "their end", timeout=300)
    killer = jobs.pop(77)
    infos = rig.outcomes(jobs + blocker)
    assert {(info.status, info.attempts) for info in infos} == {(Status.SUCCEEDED, 1)}
    assert killer.info().error.code is ErrorCode.ATTEMPTS_EXHAUSTED  # type: ignore[union-attr]
    assert killer.info().attempts == 2
    assert [letter.id for letter in rig.operator.dead_letters()] == [killer.id]
    assert len(seen) - 1 <= 8


@pytest.mark.parametrize(
    ("size", "why"), [(CRASHING_SIZE, "crashed (SIGSEGV)"), (HANGING_SIZE, "hung")]
)
def test_a_picture_that_ends_its_front_twice_is_invalid_and_costs_no_other_job(
    rig: Rig, size: tuple[int, int], why: str
) -> None:
    worker = start(rig, watchdog_s=8)
    engine = parts.processes(worker, "engine")
    neighbours = rig.submit_all(["sleep 0.05"] * 30)
    job = rig.client.caption(rig.upload("none", png(size=size)), "fine")
    info = job.wait(120)
    assert info.error is not None
    assert info.error.code is ErrorCode.IMAGE_INVALID
    assert info.attempts <= 2  # one, if another picture was in the decoder at first
    assert f"decoding this image {why} the process" in info.error.message
    unharmed(rig, neighbours)
    assert parts.processes(worker, "engine") == engine


def test_a_frozen_front_is_ended_and_its_jobs_are_not_charged(rig: Rig) -> None:
    worker = start(rig, watchdog_s=8)
    jobs = stopped_at(rig, ("received", "claimed", "fetching"))
    frozen = parts.processes(worker, "front")
    for each in frozen:
        each.suspend()
    wait_until(lambda: not any(map(parts.is_alive, frozen)), "their end", 60)
    stops.let_go(rig.stops)
    unharmed(rig, jobs)


def test_a_frozen_engine_is_ended_and_no_job_is_charged(rig: Rig) -> None:
    worker = start(rig, watchdog_s=8)
    frozen = parts.processes(worker, "engine")
    jobs = rig.submit_all(["sleep 0.1"] * 60)
    wait_until(lambda: rig.running() >= 32, "a full worker")
    frozen[0].suspend()
    wait_until(lambda: not parts.is_alive(frozen[0]), "its end", 60)
    unharmed(rig, jobs)


def test_an_engine_that_reads_nothing_for_a_while_fills_its_socket_and_loses_nothing(
    rig: Rig,
) -> None:
    worker = start(rig, concurrency=128)
    engine = parts.processes(worker, "engine")[0]
    engine.suspend()
    jobs = rig.submit_all(["fine"] * 300)  # their pixels are more than a socket holds
    wait_until(lambda: rig.running() == 128, "a full worker")
    engine.resume()
    unharmed(rig, jobs)
    assert parts.is_alive(engine)


def test_garbage_and_a_flood_on_the_socket_harm_no_job(rig: Rig) -> None:
    worker = start(rig)
    before = parts.processes(worker, "front") + parts.processes(worker, "engine")
    jobs = rig.submit_all(["sleep 0.02"] * 100)
    dice = random.Random(22)
    path = parts.run_folder(worker) / "engine.sock"
    for size in (0, 1, 24, 70_000, 3_000_000) * 20:
        throw(path, dice.randbytes(size))
    flood = [connected(path) for _ in range(200)]
    unharmed(rig, jobs)
    for each in flood:
        each.close()
    assert parts.processes(worker, "front") + parts.processes(worker, "engine") == before


def throw(path: Path, data: bytes) -> None:
    with connected(path) as raw:
        try:
            raw.sendall(data)
        except OSError:
            return  # it was cut while it sent


def connected(path: Path) -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    made.settimeout(5)
    try:
        made.connect(str(path))
    except OSError:  # the engine takes no more
        return made
    return made


def hostile(number: int) -> bytes:
    """A picture that is none, or that asks for more than it is worth; two crash a decoder."""
    whole = png(size=(64, 64))
    match number % 8:
        case 0:
            return b""
        case 1:
            return random.Random(number).randbytes(5000)
        case 2:
            return whole[: len(whole) // 2]
        case 3:
            return whole[:16] + b"\xff\xff\xff\xff\xff\xff\xff\xff" + whole[24:]  # its size
        case 4:
            return b"GIF89a" + bytes(200)
        case 5:
            return b"\xff\xd8\xff" + random.Random(number).randbytes(5000)
        case 6:
            return png(size=(9000, 9000))
        case _:
            return png(size=CRASHING_SIZE) if number in (7, 39) else b"<svg/>"


def test_64_hostile_pictures_fail_by_themselves(rig: Rig) -> None:
    worker = start(rig)
    engine = parts.processes(worker, "engine")
    evil, fine = [], []
    for number in range(64):
        evil.append(rig.client.caption(rig.upload("none", hostile(number)), "fine"))
        fine.append(rig.submit("fine"))
    infos = rig.outcomes(evil, timeout=180)
    codes = {info.error.code if info.error else info.status for info in infos}
    assert codes <= {ErrorCode.IMAGE_INVALID, ErrorCode.IMAGE_TOO_LARGE}, codes
    unharmed(rig, fine)
    assert parts.processes(worker, "engine") == engine
    assert worker.exit_code is None


def test_a_group_that_is_told_to_end_as_a_whole_drains(rig: Rig) -> None:
    """As systemd does it: each process is told directly, and fronts by the main process, too."""
    worker = start(rig, drain_timeout_s=60)
    jobs = rig.submit_all(["sleep 0.2"] * 20)
    wait_until(lambda: rig.running() == 20, "all to run")
    for each in [*psutil.Process(worker.pid).children(), psutil.Process(worker.pid)]:
        each.terminate()
    rig.wait_for_death(worker)
    assert worker.exit_code == 0
    assert "handed back" not in worker.last_words(1000)
    unharmed(rig, jobs, timeout=1)


def test_nothing_of_a_killed_main_process_lingers(rig: Rig) -> None:
    worker = start(rig)
    left = parts.processes(worker, "front") + parts.processes(worker, "engine")
    folder = parts.run_folder(worker)
    rig.all_succeed(rig.submit_all(["fine"] * 20))
    os.kill(worker.pid or 0, signal.SIGKILL)
    rig.wait_for_death(worker)
    wait_until(lambda: not any(map(parts.is_alive, left)), "the end of all processes", 60)
    start(rig)
    assert not folder.exists()
    assert rig.running() == 0
