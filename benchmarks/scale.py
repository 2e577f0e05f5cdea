"""Several workers on one queue: a model that sleeps, and repeated images with the real cache."""

from typing import Any

from benchmarks.overhead import SLEEPING, requests
from benchmarks.photos import pictures
from blipq_worker.bench.stack import Stack, running
from blipq_worker.bench.workloads import GREEDY

WORKERS = (1, 2, 4, 8)
CACHED = (1, 2, 4)
TIMES = 4
REPEATED = 256


def scale(jobs: int) -> dict[str, Any]:
    """Jobs a second by number of workers: ``jobs`` for each of them."""
    return {
        "sleeping": {
            f"batches of {size}": {str(n): _sleeping(n, jobs, size) for n in WORKERS}
            for size in (1, 16)
        },
        "repeated": {str(n): _repeated(n, REPEATED) for n in CACHED},
    }


def _sleeping(workers: int, jobs: int, size: int) -> dict[str, float]:
    """8 ms a pass and 4 ms a row, nothing read from S3."""
    environment = {
        "BENCH_PASS_MS": "8",
        "BENCH_ROW_MS": "4",
        "BENCH_FETCH": "0",
        "BLIPQ_MAX_BATCH_SIZE": str(size),
    }
    with running() as stack:
        for _ in range(workers):
            stack.start_worker(environment, SLEEPING)
        image = stack.upload([b"nothing"])[0]
        stack.backlog(requests(image, 20 * workers))
        through = stack.backlog(requests(image, jobs * workers))
        spent = sum(through.cpu_s.values())
        return {"per_s": through.per_s, "cores_busy": spent / through.seconds}


def _repeated(workers: int, jobs: int) -> dict[str, float]:
    """The demo model; who takes a job is chance, so the hit rate falls with more workers."""
    with running() as stack:
        for _ in range(workers):
            stack.start_worker({"BLIPQ_MODELS": "default=demo", "OMP_NUM_THREADS": "1"})
        return _hits(stack, jobs)


def _hits(stack: Stack, jobs: int) -> dict[str, float]:
    source = pictures(7)
    stack.backlog(list(GREEDY.requests(stack.upload(source.take(16)))))
    # An image comes back when all the others have come, not beside itself.
    images = TIMES * stack.upload(source.take(jobs // TIMES))
    through = stack.backlog(list(GREEDY.requests(images)))
    receipts = [info.receipt for info in through.infos if info.receipt]
    hits = sum(bool(receipt.cache_hit) for receipt in receipts)
    return {"per_s": through.per_s, "hit_rate": hits / len(images)}
