"""Figures of a bench: everything measured, and the table that shows it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from blipq_worker.bench.pictures import Pictures, drawn, read
from blipq_worker.bench.run import Bench, about_this_run
from blipq_worker.bench.workloads import LOADS, MIXED, WORKLOADS

errors = Console(stderr=True, highlight=False)


@dataclass(frozen=True)
class Options:
    """What is measured. images: a folder of photos, or None for drawn ones."""

    model: str = "demo"
    images: Path | None = None
    jobs: int = 256
    processes: int = 1
    latency: bool = False
    workloads: Sequence[str] = ()


def measured(options: Options) -> dict[str, Any]:
    """Everything that the options name. Raises BlipqError, ValueError."""
    workloads = [
        each for each in WORKLOADS if each.name in options.workloads or not options.workloads
    ]
    photos = read(options.images) if options.images else drawn()
    environment = {"BLIPQ_MODELS": f"default={options.model}"}
    if options.processes > options.jobs:
        raise ValueError(f"{options.processes} processes are more than {options.jobs} jobs")
    bench = Bench(environment, Pictures(photos), options.jobs, processes=options.processes)
    given = {name: getattr(options, name) for name in ("model", "jobs", "processes")}
    found = {**about_this_run(), **given}
    errors.print(f"{found['machine']}; other work now: load average {found['load_average']:.1f}")
    errors.print("the bare engine ...")
    found["bare"] = bench.ceilings(workloads)
    errors.print("the whole service ...")
    found["service"] = bench.through(workloads)
    if options.latency and MIXED in workloads:
        errors.print("latency ...")
        capacity = found["service"][MIXED.name]["images_per_s"]
        rates = {name: share * capacity for name, share in LOADS.items()}
        found["latency"] = bench.latencies(MIXED, rates)
    return found


def table(found: Mapping[str, Any]) -> Table:
    """What people look at first."""
    title = f"{found['model']}: images a second, {found['jobs']} jobs each"
    shown = Table("asked", "bare engine", "service", "efficiency", title=title)
    for workload in WORKLOADS:
        if workload.name not in found["service"]:
            continue
        bare, service = found["bare"][workload.name], found["service"][workload.name]
        shown.add_row(
            workload.about,
            f"{bare['images_per_s']:.1f} ({bare['loop']})",
            f"{service['images_per_s']:.1f}",
            f"{service['images_per_s'] / bare['images_per_s']:.2f}",
        )
    for name, one in found.get("latency", {}).items():
        waits = f"p50 {one['p50_s']:.2f} s, p99 {one['p99_s']:.2f} s"
        shown.add_row(f"{MIXED.about}, at {name} load", "", waits, "")
    return shown
