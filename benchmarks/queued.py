"""A long queue: how fast jobs are submitted, and who holds how much memory for them."""

import time
from typing import Any

import psutil

from benchmarks.overhead import SLEEPING, requests
from blipq_worker.bench.stack import Stack, running

ONE_BY_ONE, MANY = 1_000, 10_000
#: A worker that holds its first jobs and ends none while the others are submitted.
HOLDING = {
    "BLIPQ_MODELS": "default=3600000+0",
    "BENCH_FETCH": "0",
    "BLIPQ_WATCHDOG_S": "3600",
    "BLIPQ_JOB_TIMEOUT_S": "3600",
    "BLIPQ_DRAIN_TIMEOUT_S": "0",
}


def queued(jobs: int) -> dict[str, Any]:
    """Jobs a second by ``submit`` and by ``submit_many``, Redis' bytes a job, and what grows."""
    with running() as stack:
        image = stack.upload([b"nothing"])[0]
        stack.start_workers(HOLDING, SLEEPING)
        started = time.monotonic()
        for each in requests(image, ONE_BY_ONE):
            stack.client.submit(each)
        one_by_one = ONE_BY_ONE / (time.monotonic() - started)
        before = _memory(stack)
        started = time.monotonic()
        for _ in range(jobs // MANY):
            stack.client.submit_many(requests(image, MANY))
        many = jobs / (time.monotonic() - started)
        grown = {name: size - before[name] for name, size in _memory(stack).items()}
    return {
        "jobs": jobs,
        "one_by_one_per_s": one_by_one,
        "many_per_s": many,
        "ratio": many / one_by_one,
        "bytes_per_job": grown.pop("redis") / jobs,
        "grown_mb": {name: size / 2**20 for name, size in grown.items()},
    }


def _memory(stack: Stack) -> dict[str, int]:
    """Bytes by who holds them: Redis by its own count, the others resident."""
    info: Any = stack.client.ledger.redis.info("memory")
    pids = {"client": None, "worker": stack.workers[0].pid}
    resident = {name: int(psutil.Process(pid).memory_info().rss) for name, pid in pids.items()}
    return {"redis": int(info["used_memory"]), **resident}
