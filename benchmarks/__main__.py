"""``python -m benchmarks [SECTION...]``: measures, and keeps the figures in ``results/``.

All sections together end within a quarter of an hour, or with ``--long`` within three hours. Each
is a process of its own; one that is too slow for its share of that time is ended, and what it found
last stays.
"""

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from benchmarks import (
    engine,
    forms,
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
    split,
    steps,
    throughput,
)
from benchmarks.processes import end


class Section(NamedTuple):
    """A section of the page: what measures it, the size of a usual run and of a long one.

    share: of the time for all sections, by the seconds that a usual run takes on two cores.
    """

    run: Callable[[int], dict[str, Any]]
    usual: int
    long: int
    share: int


#: In the order of the page.
SECTIONS = {
    "bare": Section(throughput.bare, 32, 512, 170),
    "profile": Section(profiling.profile, 4, 30, 50),
    "peers": Section(throughput.peers, 16, 96, 150),
    "latency": Section(latency.latency, 1, 7, 150),
    "overhead": Section(overhead.overhead, 1_000, 30_000, 45),
    "queued": Section(queued.queued, 100_000, 1_000_000, 25),
    "scale": Section(scale.scale, 12, 500, 90),
    "engine": Section(engine.engine, 2, 9, 35),
    "packing": Section(packing.packing, 3, 9, 20),
    "steps": Section(steps.steps, 5, 15, 10),
    "roofline": Section(roofline.roofline, 3, 5, 40),
    "host": Section(host.host, 6, 60, 70),
    "split": Section(split.split, 3, 20, 45),
    "forms": Section(forms.forms, 1, 9, 90),
}
#: Seconds for all sections, of a usual and of a long run. Ending a section may take some more.
USUAL_S, LONG_S = 840.0, 3 * 3600.0


def main() -> int:
    """Measures what is named, or everything, then writes the page's tables; the exit code."""
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--long", action="store_true", help="more jobs: an hour, less noise")
    parser.add_argument("--page", action="store_true", help="only write the page again")
    parser.add_argument("--only", choices=SECTIONS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}")
    if options.only:
        # Programs that a shell starts in the background ignore the interrupt that ends a section.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            measure(options.only, options.long)
        except KeyboardInterrupt:  # its share of the time is over
            return 128 + signal.SIGINT
        return 0
    failed = []
    if not options.page:
        failed = measure_all(options.sections or list(SECTIONS), options.long)
    page.write()
    return 1 if failed else 0


def measure(name: str, long: bool) -> None:
    """Runs a section in this process, and keeps what it finds."""
    section = SECTIONS[name]
    size = section.long if long else section.usual
    results.measure(name, partial(section.run, size), long=long)


def measure_all(names: Sequence[str], long: bool) -> list[str]:
    """Runs sections one after the other, each in a process of its own; those that failed.

    What a section leaves of its time goes to those after it.
    """
    ending = time.monotonic() + (LONG_S if long else USUAL_S)
    failed = []
    for number, name in enumerate(names):
        shares = [SECTIONS[each].share for each in names[number:]]
        started = time.monotonic()
        limit = max(1.0, ending - started) * shares[0] / sum(shares)
        why = _failure(_start(name, long), limit)
        print(f"{name}: {why or f'{time.monotonic() - started:.0f} s'}", flush=True)
        failed += [name] if why else []
    return failed


def _start(name: str, long: bool) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "benchmarks", "--only", name, *["--long"] * long]
    return subprocess.Popen(command)


def _failure(process: "subprocess.Popen[bytes]", limit_s: float) -> str | None:
    """Waits for a section; why it found nothing, or None."""
    try:
        code = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        end(process)
        return f"ended after {limit_s:.0f} s without figures: too slow for its share of the time"
    except BaseException:
        end(process)
        raise
    return f"ended with code {code} and without figures" if code else None


if __name__ == "__main__":
    # So that a section never outlives this process: ``end`` runs while it exits.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
