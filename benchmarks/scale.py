"""Several workers on one queue: a model that sleeps, and repeated images with the real cache."""

from typing import Any

from benchmarks.overhead import SLEEPING, requests
from benchmarks.photos import pictures
from blipq_worker.bench.pictures import Pictures
from blipq_worker.bench.stack import Stack, running
from blipq_worker.bench.workloads import GREEDY

WORKERS = (1, 2, 4, 8)
CACHED = (1, 2, 4)
TIMES = 4
REPEATED = 256
#: Served models by name: milliseconds of a pass, and of each of its rows; and their share of jobs.
SPEEDS, SHARES = {"fast": "8+4", "slow": "32+16"}, {"fast": 4, "slow": 1}
#: Jobs that a worker holds which takes one at a time.
HELD = 2


def scale(jobs: int) -> dict[str, Any]:
    """Jobs a second by number of workers: ``jobs`` for each of them."""
    return {"sleeping": _sleeping(jobs), "repeated": _repeated(REPEATED)}


def _sleeping(jobs: int) -> dict[str, dict[str, dict[str, float]]]:
    """One job a pass, nothing read from S3."""
    settings = {
        "BLIPQ_MODELS": ",".join(f"{name}={times}" for name, times in SPEEDS.items()),
        "BENCH_FETCH": "0",
        "BLIPQ_MAX_BATCH_SIZE": "1",
    }
    found: dict[str, dict[str, dict[str, float]]] = {name: {} for name in SPEEDS}
    with running() as stack:
        image = stack.upload([b"nothing"])[0]
        for workers in WORKERS:
            while len(stack.workers) < workers:
                stack.start_workers(settings, SLEEPING)
            for name in SPEEDS:
                count = (HELD + SHARES[name] * jobs + HELD) * workers
                through = stack.backlog(requests(image, count), name)
                rate = through.steady_per_s(HELD * workers)
                figures = {"per_s": rate, "cores_busy": through.cores_busy}
                found[name][str(workers)] = figures
    return {f"{SPEEDS[name].replace('+', ' + ')} ms": each for name, each in found.items()}


def _repeated(jobs: int) -> dict[str, dict[str, float]]:
    """The demo model; who takes a job is chance, so the hit rate falls with more workers."""
    settings = {"BLIPQ_MODELS": "default=demo", "OMP_NUM_THREADS": "1"}
    found, source = {}, pictures(7)
    with running() as stack:
        for workers in CACHED:
            while len(stack.workers) < workers:
                stack.start_workers(settings)
            found[str(workers)] = _hits(stack, source, jobs)
    return found


def _hits(stack: Stack, source: Pictures, jobs: int) -> dict[str, float]:
    stack.backlog(list(GREEDY.requests(stack.upload(source.take(16)))))
    # An image comes back when all the others have come, not beside itself.
    images = TIMES * stack.upload(source.take(jobs // TIMES))
    through = stack.backlog(list(GREEDY.requests(images)))
    receipts = [info.receipt for info in through.infos if info.receipt]
    hits = sum(bool(receipt.cache_hit) for receipt in receipts)
    return {"per_s": through.per_s, "hit_rate": hits / len(images)}
