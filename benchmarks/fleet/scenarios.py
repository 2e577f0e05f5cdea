"""What fleets do under load, kills, bursts and cold starts, and where each limit is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.fleet.costs import Costs, Gpu
from benchmarks.fleet.simulation import Fleet

#: Share of what the GPUs can do that comes in, and the share of Redis' core that may be used.
LOAD, FULL = 0.8, 0.7
#: GPUs and cells of a steady load, and for how long; the first part of it is not counted.
FLEETS = ((1, 1), (10, 1), (100, 1), (100, 12), (1_000, 1), (1_000, 12), (1_000, 120))
STEADY_S, WARM_S = 40.0, 10.0
#: Of what befalls a fleet: GPUs and cells, when it begins, and how long it is watched.
EVENTS_FLEET, AT_S, WATCHED_S = (20, 2), 20.0, 400.0
BURST, BURST_S, AWAY_S = 2.0, 30.0, 30.0
#: A job that takes longer than so many full passes is late.
USUAL_PASSES = 3.0


@dataclass(frozen=True)
class Event:
    """What befalls a fleet at AT_S.

    burst: how many times as much comes then. cold: nobody serves until then and a start more.
    """

    happen: Callable[[Fleet], object] = lambda fleet: None
    burst: float = 1.0
    cold: bool = False


def simulated(costs: Costs, gpu: Gpu) -> dict[str, Any]:
    """All scenarios, and the figures of one GPU and one Redis."""
    per_gpu = LOAD * gpu.per_s
    per_redis = FULL * 1e6 / costs.job_us
    return {
        "gpu": {"per_s": gpu.per_s, "cold_s": gpu.cold_s, "lease_s": gpu.lease_s},
        "redis": {
            "job_us": costs.job_us,
            "per_s": per_redis,
            "gpus": per_redis / per_gpu,
            "gb_a_day": per_redis * 86400 * costs.ended_bytes / 1e9,
            "open_bytes": costs.open_bytes,
            "ended_bytes": costs.ended_bytes,
        },
        "steady": [_steady(costs, gpu, *each) for each in FLEETS],
        "events": {name: _event(costs, gpu, event) for name, event in _events(gpu).items()},
    }


def _steady(costs: Costs, gpu: Gpu, gpus: int, cells: int) -> dict[str, float]:
    fleet = Fleet(cells, gpus, gpu, costs)
    offered = LOAD * gpus * gpu.per_s
    fleet.arriving(lambda now: offered, STEADY_S)
    fleet.run(STEADY_S)
    ended = sum(each.count for each in fleet.ended if WARM_S <= each.at <= STEADY_S)
    per_s = ended / (STEADY_S - WARM_S)
    return {
        "gpus": gpus,
        "cells": cells,
        "offered_per_s": offered,
        "per_s": per_s,
        "p99_s": fleet.latency(0.99, WARM_S),
        "redis_busy": min(1.0, fleet.redis_busy(STEADY_S)),
        "gb_a_day": per_s / cells * 86400 * costs.ended_bytes / 1e9,
    }


def _events(gpu: Gpu) -> dict[str, Event]:
    """What befalls a fleet, by its name."""

    def kill(share: float) -> Callable[[Fleet], None]:
        def killed(fleet: Fleet) -> None:
            workers = [worker for cell in fleet.cells for worker in cell.workers]
            for worker in workers[: round(share * len(workers))]:
                fleet.kill(worker)

        return killed

    return {
        "nothing": Event(),
        "a tenth of the GPUs killed": Event(kill(0.1)),
        "half of the GPUs killed": Event(kill(0.5)),
        f"{BURST:g} times the load for {BURST_S:.0f} s": Event(burst=BURST),
        f"one Redis away for {AWAY_S:.0f} s": Event(lambda f: f.stop_redis(f.cells[0], AWAY_S)),
        f"a start from nothing, {gpu.cold_s:.0f} s": Event(cold=True),
    }


def _event(costs: Costs, gpu: Gpu, event: Event) -> dict[str, float]:
    """What an event does. recovery_s: from its begin until latencies are usual again."""
    gpus, cells = EVENTS_FLEET
    ready_at = AT_S + gpu.cold_s if event.cold else 0.0
    fleet = Fleet(cells, gpus, gpu, costs, ready_at=ready_at)
    offered = LOAD * gpus * gpu.per_s

    def rate(now: float) -> float:
        return offered * (event.burst if AT_S <= now < AT_S + BURST_S else 1.0)

    fleet.at(AT_S if event.cold else 0.0, fleet.arriving, rate, WATCHED_S)
    fleet.at(AT_S, event.happen, fleet)
    fleet.run(WATCHED_S)
    late = [each for each in fleet.ended if each.took > USUAL_PASSES * gpu.batch / gpu.per_s]
    return {
        "p99_s": fleet.latency(0.99, AT_S),
        "longest_s": fleet.latency(1.0, AT_S),
        "late": sum(each.count for each in late) / fleet.jobs_ended(),
        "recovery_s": max((each.at for each in late), default=AT_S) - AT_S,
        "most_open": max(cell.most_open for cell in fleet.cells),
        "open_mb": max(cell.most_open for cell in fleet.cells) * costs.open_bytes / 1e6,
    }
