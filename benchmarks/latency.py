"""Seconds from submit to outcome under Poisson arrivals: rows that join, and batch after batch."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from benchmarks.photos import pictures
from benchmarks.throughput import PROCESSES, environment
from blipq.contract import ImageRef, Request
from blipq_worker.bench.pictures import Pictures
from blipq_worker.bench.stack import Stack, Through, running
from blipq_worker.bench.workloads import MIXED

LOADS = {"30 %": 0.3, "60 %": 0.6, "90 %": 0.9}
WORKERS = [sys.executable, "-m", "benchmarks.workers"]
#: What stands in for the worker, by how jobs come together; a model of the stack is served by each.
POLICIES = {"joining": None, "closed": [*WORKERS, "closed"], "batches": [*WORKERS, "batchwise"]}
#: How long jobs arrive in one run, and how many find the capacity.
SECONDS, BACKLOG = 5, 96
#: Images of the jobs whose images were seen before, and how often, so that every worker has.
SEEN, TIMES = 32, 6
SHORT = replace(MIXED, shortest=1, longest=2)

#: So many requests.
Work = Callable[[int], list[Request]]


def latency(repeats: int) -> dict[str, Any]:
    """Medians of so many runs, in each of which the policies take turns.

    Loads are shares of what joining rows reach with a full backlog, seen images or not.
    """
    source = pictures(4)
    with running() as stack:
        for policy, program in POLICIES.items():
            served = {"BLIPQ_MODELS": environment()["BLIPQ_MODELS"].replace("default", policy)}
            stack.start_workers(environment() | served, program, processes=PROCESSES)

        def new(count: int) -> list[Request]:
            return list(MIXED.requests(stack.upload(source.take(count))))

        looked_at = _seen(stack, source)

        def seen(count: int) -> list[Request]:
            return list(MIXED.requests([looked_at[number % SEEN] for number in range(count)]))

        return {
            name: _loads(stack, work, repeats) for name, work in {"seen": seen, "new": new}.items()
        }


def _seen(stack: Stack, source: Pictures) -> list[ImageRef]:
    """Images that all workers have looked at, or nearly all: chance decides who takes a job."""
    images = stack.upload(source.take(SEEN))
    for policy in POLICIES:
        for _ in range(TIMES):
            stack.backlog(list(SHORT.requests(images)), policy)
    return images


def _loads(stack: Stack, work: Work, repeats: int) -> dict[str, Any]:
    """By policy and load."""
    capacity = stack.backlog(work(BACKLOG), "joining").per_s
    found: dict[str, Any] = {policy: {} for policy in POLICIES}
    for name, share in LOADS.items():
        runs: dict[str, list[Through]] = {policy: [] for policy in POLICIES}
        for seed in range(repeats):
            requests = work(round(SECONDS * share * capacity))
            for policy in POLICIES:
                runs[policy].append(stack.arriving(requests, share * capacity, policy, seed))
        for policy, through in runs.items():
            found[policy][name] = {"per_s": share * capacity, **_medians(through)}
    return {"capacity_per_s": capacity, **found}


def _medians(runs: Sequence[Through]) -> dict[str, float]:
    return {
        "p50_s": median(each.percentile(0.5) for each in runs),
        "p99_s": median(each.percentile(0.99) for each in runs),
        "cores_busy": median(each.cores_busy for each in runs),
    }
