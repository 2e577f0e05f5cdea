"""The tables of the simulation, and of what a tenant does to another's wait."""

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.fleet.measured import off

#: Each with its head and rows, as ``benchmarks.page`` writes them.
Table = tuple[list[str], list[list[str]]]

_RUN_NAMES = {
    "per_s": "jobs/s",
    "p50_s": "p50 s",
    "p99_s": "p99 s",
    "redis_busy": "Redis busy",
    "commands_per_s": "Redis commands/s",
    "recovery_s": "recovery s",
}


def runs(found: Mapping[str, Any]) -> Table:
    """Measured, and simulated behind it."""
    lines = []
    for name, run in found["real"]["runs"].items():
        pairs = [_pair(run, figure) for figure in _RUN_NAMES]
        lines.append([name, *pairs, f"{off(run):.1%}"])
    return ["run", *_RUN_NAMES.values(), "off at the most"], lines


def _pair(run: Mapping[str, Any], figure: str) -> str:
    if figure not in run["measured"]:
        return ""
    real, simulated = run["measured"][figure], run["simulated"][figure]
    return f"{real:,.4g}, {simulated:,.4g}"


def steady(found: Mapping[str, Any]) -> Table:
    """Fleets under a steady load."""
    head = ["GPUs", "Redis", "offered jobs/s", "jobs/s", "p99 s", "Redis busy", "GB a day a Redis"]
    lines = [
        [
            f"{each['gpus']:,}",
            f"{each['cells']:,}",
            f"{each['offered_per_s']:,.0f}",
            f"{each['per_s']:,.0f}",
            f"{each['p99_s']:.2f}" if each["redis_busy"] < 1 else "grows",
            f"{each['redis_busy']:.0%}",
            f"{each['gb_a_day']:,.0f}",
        ]
        for each in found["simulated"]["steady"]
    ]
    return head, lines


def events(found: Mapping[str, Any]) -> Table:
    """What befalls a fleet."""
    head = ["what happens", "p99 s", "longest s", "late jobs", "usual again after s", "most open"]
    lines = [
        [
            name,
            f"{each['p99_s']:.2f}",
            f"{each['longest_s']:.1f}",
            f"{each['late']:.1%}",
            f"{each['recovery_s']:.0f}",
            f"{each['most_open']:,} ({each['open_mb']:,.0f} MB)",
        ]
        for name, each in found["simulated"]["events"].items()
    ]
    return head, lines


def limits(found: Mapping[str, Any]) -> Table:
    """Where each limit is, and what to change."""
    gpu, redis = found["simulated"]["gpu"], found["simulated"]["redis"]
    hour_gb = redis["gb_a_day"] / 24
    lines = [
        [
            "one core of Redis, at 70 %",
            f"{redis['per_s']:,.0f} jobs/s: {redis['gpus']:.0f} GPUs",
            "another Redis with workers of its own; messages over RabbitMQ or SQS",
        ],
        [
            "its memory, at that rate",
            f"{redis['gb_a_day']:,.0f} GB with a day of results, {hour_gb:.0f} GB for an hour",
            "`keep`, `BLIPQ_RESULT_TTL`, `BLIPQ_KEEP_DELIVERED=0`, `BLIPQ_RESULTS`",
        ],
        [
            "a machine that dies with its jobs",
            f"{gpu['lease_s']:.0f} s until they are published again, then alone",
            "`BLIPQ_LEASE_S`; a process that dies under a supervisor costs 2 s",
        ],
        [
            "a start",
            f"{gpu['cold_s']:.0f} s without its GPU",
            "workers in reserve; caches of kernels that persist",
        ],
        [
            "a burst",
            "what is above the GPUs' rate waits",
            "priorities, limits of tenants, deadlines; scale on predicted work",
        ],
    ]
    return ["limit", "where it is", "what to change"], lines


def tenants(found: Mapping[str, Any]) -> Table:
    """Seconds of one tenant's jobs, by what another one has submitted."""
    lines = [
        [name, f"{each['p50_s']:.2f}", f"{each['most_s']:.2f}"]
        for name, each in found["real"]["tenants"].items()
    ]
    return ["a tenant's jobs, one at a time", "p50 s", "longest s"], lines


def text(found: Mapping[str, Any]) -> Iterator[Table]:
    """Those of the page about performance, in their order."""
    for make in (runs, steady, events, limits):
        yield make(found)
