"""What a job costs beside its model, here and at another commit: ``python -m benchmarks.cost``.

``--against FOLDER`` names a checkout of the other commit with a virtual environment of its own in
``.venv``. Both are measured by this file, in turn, ``--rounds`` times; their medians are compared.
The model answers at once and knows every image, and nothing is read from S3: what is left is the
queue.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.overhead import AT_ONCE, THREADS, requests
from blipq.contract import ImageRef
from blipq_worker.bench.stack import Stack, running

ROOT = Path(__file__).parents[1]
WORKER = [sys.executable, __file__, "--worker"]
#: So many jobs first: the list of the last thousand is full, and every cache is warm.
WARM, ALONE = 1_100, 60
TIMEOUT_S = 300.0
#: What is told of each figure; of the last one more is better.
FIGURES = {
    "redis_us": "Redis CPU a job, us",
    "redis_worker_us": "of it for the worker, us",
    "worker_us": "worker CPU a job, us",
    "client_us": "client CPU a job, us",
    "round_trips": "round trips of a worker a job",
    "commands": "commands of a worker a job, those in scripts too",
    "bytes": "bytes of Redis an ended job",
    "idle_p50_ms": "one job alone, p50 ms",
    "per_s": "jobs a second",
}


def measured(jobs: int) -> dict[str, float]:
    """The figures of the blipq that this interpreter imports."""
    with running() as stack:
        image = stack.upload([b"nothing"])[0]
        environment = {**AT_ONCE, "BENCH_FETCH": "0", "BLIPQ_CONCURRENCY": str(THREADS)}
        stack.start_workers(environment, WORKER)
        stack.backlog(requests(image, WARM))
        found = {**from_submit_to_result(stack, image, jobs), **_drained(stack, image, jobs)}
        found["idle_p50_ms"] = _alone(stack, image)
        return found


def work() -> int:
    """A worker whose model has seen every image, so that none is decoded."""
    from benchmarks import workers

    def recall(self: Any, digest: str, needed: Any) -> Any:
        return workers.Pixels(None, digest=digest)

    workers.SleepingModel.recall = recall  # type: ignore[method-assign]
    return workers.main("sleeping")


def from_submit_to_result(stack: Stack, image: ImageRef, jobs: int) -> dict[str, float]:
    """Jobs that come one by one while a worker takes them, and are waited for."""
    before = _cpu_s(stack)
    submitted = [stack.client.submit(each) for each in requests(image, jobs)]
    stack.client.wait_all(submitted, timeout=TIMEOUT_S)
    spent = {name: each - before[name] for name, each in _cpu_s(stack).items()}
    return {f"{name}_us": 1e6 * each / jobs for name, each in spent.items()}


def _drained(stack: Stack, image: ImageRef, jobs: int) -> dict[str, float]:
    """A backlog that waits for the worker: nobody else uses Redis while it is worked off."""
    memory = _redis_info(stack)["used_memory"]
    stack.workers[0].signal(signal.SIGSTOP)
    stack.client.submit_many(requests(image, jobs))
    before, cpu, started = _redis_info(stack), _cpu_s(stack), time.monotonic()
    stack.workers[0].signal(signal.SIGCONT)
    looks = 0
    while stack.client.ledger.redis.zcard("blipq:open"):
        looks += 1
        time.sleep(0.05)
        if time.monotonic() > started + TIMEOUT_S:
            raise TimeoutError("the worker does not work its backlog off")
    took = time.monotonic() - started
    after = _redis_info(stack)
    looks += 2  # each of the two reads of the figures sends one command before them, or behind
    return {
        "per_s": jobs / took,
        "redis_worker_us": 1e6 * (_cpu_s(stack)["redis"] - cpu["redis"]) / jobs,
        "round_trips": (after["reads"] - before["reads"] - looks) / jobs,
        "commands": (after["calls"] - before["calls"] - looks) / jobs,
        "bytes": (_redis_info(stack)["used_memory"] - memory) / jobs,
    }


def _redis_info(stack: Stack) -> dict[str, int]:
    info: Any = stack.client.ledger.redis.info("everything")
    calls = sum(each["calls"] for name, each in info.items() if name.startswith("cmdstat_"))
    return {
        "used_memory": info["used_memory"],
        "reads": info["total_reads_processed"],
        "calls": calls,
    }


def _cpu_s(stack: Stack) -> dict[str, float]:
    """CPU seconds until now."""
    redis = next(each for each in stack.local.services if each.name == "redis")
    pids = {"redis": redis.pid, "worker": stack.workers[0].pid, "client": os.getpid()}
    times = {name: psutil.Process(pid).cpu_times() for name, pid in pids.items()}
    return {name: each.user + each.system for name, each in times.items()}


def _alone(stack: Stack, image: ImageRef) -> float:
    waits = []
    for request in requests(image, ALONE):
        started = time.monotonic()
        stack.client.submit(request).result(timeout=30)
        waits.append(time.monotonic() - started)
    return 1000 * statistics.median(waits)


def _rounds(folders: Sequence[Path], rounds: int, jobs: int) -> Iterator[list[dict[str, float]]]:
    """The figures of each folder, in turn: what else the machine does hits both alike."""
    for _ in range(rounds):
        yield [_of(folder, jobs) for folder in folders]


def _of(folder: Path, jobs: int) -> dict[str, float]:
    command = [str(folder / ".venv/bin/python"), __file__, "--measure", "--jobs", str(jobs)]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def compared(against: Path, rounds: int, jobs: int) -> dict[str, Any]:
    """Medians of the other commit and of this one, and this one's share of the other."""
    ran = list(_rounds([against, ROOT], rounds, jobs))
    found: dict[str, Any] = {"jobs": jobs, "rounds": rounds}
    for figure in FIGURES:
        before, now = (statistics.median(each[place][figure] for each in ran) for place in range(2))
        found[figure] = {"before": before, "now": now, "ratio": now / before}
    return found


def rows(found: Mapping[str, Any]) -> list[list[str]]:
    """A line of the table for each figure."""
    return [
        [
            name,
            f"{found[figure]['before']:,.4g}",
            f"{found[figure]['now']:,.4g}",
            f"**{found[figure]['ratio']:.2f}**",
        ]
        for figure, name in FIGURES.items()
    ]


def main() -> None:
    """Measures, keeps what it found, and prints it."""
    parser = argparse.ArgumentParser("python -m benchmarks.cost", description=__doc__)
    parser.add_argument("--against", type=Path, help="a checkout with a .venv of its own")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2_000)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measured(options.jobs)))
        return
    if options.worker:
        sys.exit(work())
    if options.against is None:
        parser.error("--against FOLDER: a checkout to compare with")
    from benchmarks import page, results

    found = results.measure(
        "cost",
        lambda: compared(options.against.resolve(), options.rounds, options.jobs),
        command="python -m benchmarks.cost --against FOLDER",
    )
    page.write()
    for line in rows(found):
        print(" | ".join(line))


if __name__ == "__main__":
    main()
