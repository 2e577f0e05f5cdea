"""Three runs of real workers, and the same in the simulation; what a tenant does to another's wait.

The model only takes its time, and nothing is read from S3, so a run of a minute shows what the
queue, its leases and its sweep do.
"""

import signal
import statistics
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from benchmarks.fleet.costs import Costs, Gpu
from benchmarks.fleet.simulation import Fleet
from benchmarks.overhead import SLEEPING, requests
from blipq import Client, Job, TenantLimited
from blipq.contract import CaptionRequest, ImageRef
from blipq.ledger import keys
from blipq_worker.bench.stack import Stack, running

#: 40 ms a pass and 10 more for each of at most four jobs: 50 jobs a second.
GPU = Gpu(pass_s=0.040, row_s=0.010, batch=4, held=8, lease_s=3.0)
SETTINGS = {
    "BLIPQ_MODELS": f"default={1000 * GPU.pass_s:g}+{1000 * GPU.row_s:g}",
    "BLIPQ_MAX_BATCH_SIZE": str(GPU.batch),
    "BLIPQ_LEASE_S": str(GPU.lease_s),
    "BENCH_FETCH": "0",
}
#: Jobs of the run that the costs are taken from, after some others, and of the three to foretell.
WARM, CALIBRATION, ONE, TWO, KILL = 100, 400, 400, 800, 900
#: Jobs that have ended when a worker is killed.
KILLED_AFTER = 150
IDLE_S = 5.0
RUN_S = 120.0
#: Of the tenants: jobs of the one with a backlog, its limit, and jobs of the other.
BACKLOG, MOST_OPEN, LOOKS = 600, 50, 12

Figures = dict[str, float]


def measured() -> dict[str, Any]:
    """The costs here, and the figures of each run: measured, and simulated from the costs."""
    with running() as stack:
        image = stack.upload([b"nothing"])[0]
        stack.start_workers(SETTINGS, SLEEPING)
        costs = _costs(stack, image)
        runs = {"one worker": (_backlog(stack, image, ONE), simulated(costs, 1, ONE))}
        neighbours = _neighbours(stack, image)
        stack.start_workers(SETTINGS, SLEEPING)
        runs["two workers"] = _backlog(stack, image, TWO), simulated(costs, 2, TWO)
        killed = _backlog(stack, image, KILL, KILLED_AFTER), simulated(costs, 2, KILL, killed=True)
        runs["two, one killed"] = killed
    found = {name: {"measured": real, "simulated": sim} for name, (real, sim) in runs.items()}
    return {"costs": asdict(costs), "runs": found, "tenants": neighbours}


def off(run: Mapping[str, Figures]) -> float:
    """How far the simulation is off at the most, as a share of what was measured."""
    return max(abs(run["simulated"][name] / value - 1) for name, value in run["measured"].items())


def simulated(costs: Costs, workers: int, jobs: int, *, killed: bool = False) -> Figures:
    """A backlog of jobs, and the worker that is killed without another in its place."""
    fleet = Fleet(1, workers, GPU, costs)
    (cell,) = fleet.cells
    fleet.submit(cell, jobs)
    killed_at = 0.0
    if killed:
        while fleet.jobs_ended() < KILLED_AFTER:
            fleet.run(killed_at := killed_at + 0.01)
        fleet.kill(cell.workers[0], restarts=False)
    fleet.run(drained=True)
    seconds = max(each.at for each in fleet.ended)
    found = _figures(jobs, seconds, fleet.latency(0.5), fleet.latency(0.99))
    commands = jobs * costs.job_commands + fleet.worker_s * costs.idle_commands
    found["commands_per_s"] = commands / seconds
    if killed:
        found["recovery_s"] = max(each.at for each in fleet.ended if each.alone) - killed_at
    return found


def _figures(jobs: int, seconds: float, p50_s: float, p99_s: float) -> Figures:
    return {"per_s": jobs / seconds, "p50_s": p50_s, "p99_s": p99_s}


def _costs(stack: Stack, image: ImageRef) -> Costs:
    """What an idle worker and a job cost Redis here. The halves of a job's do not matter."""
    _backlog(stack, image, WARM)  # the first jobs make what others find
    cpu_s, commands = _redis(stack)
    time.sleep(IDLE_S)
    after_s, after = _redis(stack)
    idle, idle_commands = (after_s - cpu_s) / IDLE_S, (after - commands) / IDLE_S
    before, started = _redis(stack), time.monotonic()
    _backlog(stack, image, CALIBRATION)
    seconds = time.monotonic() - started
    cpu_s, commands = (now - then for now, then in zip(_redis(stack), before, strict=True))
    job_us = 1e6 * (cpu_s - idle * seconds) / CALIBRATION
    job_commands = (commands - idle_commands * seconds) / CALIBRATION
    return Costs(
        *(job_us / 2, job_us / 2, 1e6 * idle),
        job_commands=job_commands,
        idle_commands=idle_commands,
    )


def _redis(stack: Stack) -> tuple[float, int]:
    """CPU seconds by Redis' own account, and commands, those in scripts too."""
    info: Any = stack.client.ledger.redis.info("everything")
    calls = sum(each["calls"] for name, each in info.items() if name.startswith("cmdstat_"))
    return info["used_cpu_user"] + info["used_cpu_sys"], calls


def _backlog(stack: Stack, image: ImageRef, jobs: int, kill_after: int | None = None) -> Figures:
    """Jobs all at once. kill_after: how many have ended when the first worker is killed."""
    (_, before), started = _redis(stack), time.monotonic()
    submitted = stack.client.submit_many(requests(image, jobs))
    killed_at = 0.0 if kill_after is None else _kill(stack, jobs - kill_after)
    waited = stack.client.wait_all(submitted, timeout=RUN_S)
    commands = (_redis(stack)[1] - before) / (time.monotonic() - started)
    infos = [job.info() for job in waited]
    ended = [i.completed_at for i in infos if i.completed_at]
    seconds = max(ended).timestamp() - infos[0].created_at.timestamp()
    took = sorted((i.completed_at - i.created_at).total_seconds() for i in infos if i.completed_at)
    found = _figures(jobs, seconds, took[jobs // 2], took[int(0.99 * jobs)])
    found["commands_per_s"] = commands
    if kill_after is not None:
        back = [i.completed_at.timestamp() for i in infos if i.completed_at and i.attempts > 1]
        found["recovery_s"] = max(back) - killed_at
    return found


def _kill(stack: Stack, left: int) -> float:
    """Kills the first worker once so many jobs are left; when that was."""
    ending = time.monotonic() + RUN_S
    while stack.client.ledger.redis.zcard(keys.OPEN) > left and time.monotonic() < ending:
        time.sleep(0.05)
    stack.workers[0].signal(signal.SIGKILL)
    return time.time()


def _neighbours(stack: Stack, image: ImageRef) -> dict[str, Figures]:
    """Seconds that jobs of one tenant take, one by one, by what another has submitted."""
    found = {"alone": _looks(stack, image, "alone")}
    jobs = stack.client.submit_many(requests(image, BACKLOG), tenant="busy")
    found[f"behind {BACKLOG} jobs"] = _looks(stack, image, "behind", count=1)
    stack.client.wait_all(jobs)
    stack.client.limit("busy", open_jobs=MOST_OPEN)
    stop = threading.Event()
    busy = threading.Thread(target=_submit_until, args=(stack.client, image, stop))
    busy.start()
    time.sleep(1.0)
    try:
        found[f"beside at most {MOST_OPEN} open jobs"] = _looks(stack, image, "beside")
    finally:
        stop.set()
        busy.join()
        stack.client.limit("busy")
    return found


def _submit_until(client: Client, image: ImageRef, stop: threading.Event) -> None:
    """As many jobs as the limit allows, all the time."""
    jobs: list[Job[Any]] = []
    while not stop.is_set():
        request = CaptionRequest(image=image, prompt=f"busy {len(jobs)}")
        try:
            jobs.append(client.submit(request, tenant="busy"))
        except TenantLimited:
            time.sleep(0.005)
    client.wait_all(jobs)


def _looks(stack: Stack, image: ImageRef, mark: str, count: int = LOOKS) -> Figures:
    waits = []
    for number in range(count):
        started = time.monotonic()
        request = CaptionRequest(image=image, prompt=f"{mark} {number}")
        stack.client.submit(request, tenant="calm").result(timeout=RUN_S)
        waits.append(time.monotonic() - started)
    return {"p50_s": statistics.median(waits), "most_s": max(waits)}
