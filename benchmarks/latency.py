"""Seconds from submit to outcome under Poisson arrivals: rows that join, and batch after batch."""

import sys
from typing import Any

from benchmarks.photos import pictures
from benchmarks.throughput import environment
from blipq_worker.bench.run import Bench
from blipq_worker.bench.workloads import MIXED

LOADS = {"30 %": 0.3, "60 %": 0.6, "90 %": 0.9}
WORKERS = [sys.executable, "-m", "benchmarks.workers"]
#: What stands in for the worker, by how jobs come together.
POLICIES = {"joining": None, "closed": [*WORKERS, "closed"], "batches": [*WORKERS, "batchwise"]}


def latency(jobs: int) -> dict[str, Any]:
    """Loads are shares of what joining rows reach with a full backlog, seen images or not."""
    found: dict[str, Any] = {}
    for seen in (True, False):
        capacity = _capacity(jobs, seen=seen)
        rates = {name: share * capacity for name, share in LOADS.items()}
        found["seen" if seen else "new"] = {"capacity_per_s": capacity} | {
            name: Bench(environment(), pictures(4), jobs, program).latencies(
                MIXED, rates, seen=seen
            )
            for name, program in POLICIES.items()
        }
    return found


def _capacity(jobs: int, *, seen: bool) -> float:
    bench = Bench(environment(), pictures(5), jobs)
    through = bench.through([MIXED], seen=seen)
    rate: float = through[MIXED.name]["images_per_s"]
    return rate
