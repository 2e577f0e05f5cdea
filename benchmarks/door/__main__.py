"""``python -m benchmarks.door``: measures the door, and writes what it found into docs/http.md."""

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tools.docs.page import replace_section

from benchmarks import results
from benchmarks.door.pages import pages
from benchmarks.door.rates import rates
from benchmarks.door.waiting import waiting
from benchmarks.page import table

PAGE = Path(__file__).parents[2] / "docs" / "http.md"


def main() -> None:
    """Measures, keeps the figures, and writes the section."""
    parser = argparse.ArgumentParser("python -m benchmarks.door", description=__doc__)
    parser.add_argument("--jobs", type=int, default=100_000, help="in Redis while pages are read")
    jobs = parser.parse_args().jobs
    found = results.measure(
        "door",
        lambda: {"rates": rates(), "waiting": waiting(), "console": pages(jobs)},
        command="python -m benchmarks.door",
    )
    lines = [*text(found)]
    replace_section(PAGE, "cost", "\n".join(lines))
    print("\n".join(lines))


def text(found: Mapping[str, Any]) -> Iterator[str]:
    """The section, in Markdown."""
    rate, wait, console = found["rates"], found["waiting"], found["console"]
    yield from table(
        ["jobs a second, on a core each", "Python client", "door", "ratio"],
        [
            _row(rate, "one by one", "client_per_s", "door_one_connection_per_s"),
            _row(rate, "one by one, four connections", "client_per_s", "door_per_s"),
            _row(rate, "many (`submit_many`, JSONL)", "client_many_per_s", "door_batches_per_s"),
        ],
    )
    yield ""
    yield (
        f"{wait['clients']:,} clients that wait take {wait['mib']:.0f} MiB of a door and "
        f"{wait['subscriptions']:.0f} subscription at Redis; all of them are answered."
        if wait["answered"] == wait["clients"]
        else f"only {wait['answered']:,} of {wait['clients']:,} waiting clients were answered"
    )
    yield ""
    yield f"Pages of the console with {console['jobs']:,} jobs in Redis, time in the door:"
    yield ""
    yield from table(
        ["page", "median ms", "longest ms"],
        [
            [name, f"{each['median_ms']:.0f}", f"{each['max_ms']:.0f}"]
            for name, each in console["pages"].items()
        ],
    )
    yield ""
    yield results.source("door")


def _row(rate: Mapping[str, float], name: str, client: str, door: str) -> list[str]:
    ratio = f"**{rate[door] / rate[client]:.2f}**"
    return [name, f"{rate[client]:,.0f}", f"{rate[door]:,.0f}", ratio]


if __name__ == "__main__":
    main()
