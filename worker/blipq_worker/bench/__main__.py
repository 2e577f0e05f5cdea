"""``python -m blipq_worker.bench``: what ``blipq bench`` runs."""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from blipq.errors import BlipqError
from blipq.settings import CONNECTION_FIELDS
from blipq_worker.bench.pictures import Pictures, drawn, read
from blipq_worker.bench.run import Bench, about_this_run
from blipq_worker.bench.workloads import LOADS, MIXED, WORKLOADS, Workload

errors = Console(stderr=True, highlight=False)
out = Console(highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints a table, and writes the figures where they are asked for."""
    options = _parsed(arguments)
    # Servers and worker are its own, whatever the settings say.
    for name in (*CONNECTION_FIELDS, "health_port", "allowed_buckets"):
        os.environ.pop(f"BLIPQ_{name.upper()}", None)
    chosen = [each for each in WORKLOADS if each.name in options.workloads or not options.workloads]
    try:
        found = measured(options, chosen)
    except (BlipqError, ValueError) as error:
        errors.print(f"blipq bench: {error}", markup=False)
        return 1
    out.print(table(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def measured(options: argparse.Namespace, workloads: Sequence[Workload]) -> dict[str, Any]:
    """Everything that was asked for."""
    photos = read(options.images) if options.images else drawn()
    environment = {"BLIPQ_MODELS": f"default={options.model}"}
    if options.processes > options.jobs:
        raise ValueError(f"{options.processes} processes are more than {options.jobs} jobs")
    bench = Bench(environment, Pictures(photos), options.jobs, processes=options.processes)
    asked = {name: getattr(options, name) for name in ("model", "jobs", "processes")}
    found = {**about_this_run(), **asked}
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


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("blipq bench", add_help=False)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--images", type=Path)
    parser.add_argument("--jobs", type=int, default=256)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--latency", action="store_true")
    parser.add_argument("--workload", dest="workloads", action="append", default=[])
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
