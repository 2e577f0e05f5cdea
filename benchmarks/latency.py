"""Seconds from submit to outcome under Poisson arrivals: rows that join, and batch after batch."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.photos import pictures
from benchmarks.throughput import PROCESSES, environment
from blipq.contract import Request
from blipq_worker.bench.pictures import Pictures
from blipq_worker.bench.stack import Stack, Through, running
from blipq_worker.bench.workloads import LOADS, MIXED

WORKERS = [sys.executable, "-m", "benchmarks.workers"]
#: What stands in for the worker, by how jobs come together; a model of the stack is served by each.
POLICIES = {"joining": None, "closed": [*WORKERS, "closed"], "batches": [*WORKERS, "batchwise"]}
#: How long jobs arrive in one run. Of the backlog that finds the capacity a worker holds HELD.
SECONDS, BACKLOG, HELD = 4, 192, 32
#: Images of the jobs whose images were seen before, and how often, so that every worker has.
SEEN, TIMES = 32, 6
SHORT = replace(MIXED, shortest=1, longest=2)

#: So many requests.
Work = Callable[[int], list[Request]]


def latency(repeats: int) -> dict[str, Any]:
    """Of so many runs, in each of which the policies take turns.

    Loads are shares of what joining rows reach with a full backlog, seen images or not.
    """
    source = pictures(4)
    with running() as stack:
        for policy, program in POLICIES.items():
            served = {"BLIPQ_MODELS": environment()["BLIPQ_MODELS"].replace("default", policy)}
            stack.start_workers(environment() | served, program, processes=PROCESSES)

        def new(count: int) -> list[Request]:
            return list(MIXED.requests(stack.upload(source.take(count))))

        seen = seen_by(stack, source, list(POLICIES))
        return {
            name: _loads(stack, work, repeats) for name, work in {"seen": seen, "new": new}.items()
        }


def seen_by(stack: Stack, source: Pictures, models: Sequence[str]) -> Work:
    """Jobs on images that all workers of these models have looked at, or nearly all.

    Chance decides who takes a job.
    """
    images = stack.upload(source.take(SEEN))
    for model in models:
        for _ in range(TIMES):
            stack.backlog(list(SHORT.requests(images)), model)
    return lambda count: list(MIXED.requests([images[n % SEEN] for n in range(count)]))


def _loads(stack: Stack, work: Work, repeats: int) -> dict[str, Any]:
    """By policy and load."""
    for policy in POLICIES:  # equally warm
        stack.backlog(work(2 * HELD), policy)
    capacity = stack.backlog(work(BACKLOG), "joining").steady_per_s(HELD * PROCESSES)
    found: dict[str, Any] = {policy: {} for policy in POLICIES}
    for turn, (name, share) in enumerate(LOADS.items()):
        runs: dict[str, list[Through]] = {policy: [] for policy in POLICIES}
        for repeat in range(repeats):
            requests = work(round(SECONDS * share * capacity))
            for policy in _turned(list(POLICIES), turn + repeat):
                runs[policy].append(stack.arriving(requests, share * capacity, policy, repeat))
        for policy, through in runs.items():
            found[policy][name] = {"per_s": share * capacity, **_together(through)}
    return {"capacity_per_s": capacity, **found}


def _turned(policies: list[str], by: int) -> list[str]:
    """Another one is first each time."""
    by %= len(policies)
    return policies[by:] + policies[:by]


def _together(runs: Sequence[Through]) -> dict[str, float]:
    """Percentiles of all waits in these runs."""
    waits = sorted(wait for each in runs for wait in each.latencies)
    return {
        "jobs": len(waits),
        "p50_s": waits[len(waits) // 2],
        "p99_s": waits[int(0.99 * len(waits))],
        "cores_busy": sum(each.cores_busy for each in runs) / len(runs),
    }
