"""``python -m benchmarks [SECTION...]``: measures, and keeps the figures in ``results/``."""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks import (
    engine,
    host,
    latency,
    overhead,
    packing,
    page,
    profiling,
    queued,
    results,
    roofline,
    scale,
    steps,
    throughput,
)

#: Sections with their usual size and the size of a long run, in the order of the page.
SECTIONS: dict[str, tuple[Callable[[int], dict[str, Any]], int, int]] = {
    "bare": (throughput.bare, 64, 512),
    "profile": (profiling.profile, 4, 30),
    "peers": (throughput.peers, 16, 96),
    "latency": (latency.latency, 1, 7),
    "overhead": (overhead.overhead, 1_000, 30_000),
    "queued": (queued.queued, 100_000, 1_000_000),
    "scale": (scale.scale, 24, 500),
    "engine": (engine.engine, 2, 9),
    "packing": (packing.packing, 3, 9),
    "steps": (steps.steps, 5, 15),
    "roofline": (roofline.roofline, 3, 5),
    "host": (host.host, 15, 60),
}


def main() -> None:
    """Measures what is named, or everything, then writes the page's tables."""
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--long", action="store_true", help="more jobs: an hour, less noise")
    parser.add_argument("--page", action="store_true", help="only write the page again")
    options = parser.parse_args()
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}")
    for name in [] if options.page else options.sections or SECTIONS:
        run, usual, long = SECTIONS[name]
        size = long if options.long else usual
        started = time.monotonic()
        results.measure(name, partial(run, size), long=options.long)
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
    page.write()


if __name__ == "__main__":
    main()
