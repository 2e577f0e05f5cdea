"""``python -m benchmarks.datasets``: rows a second of the command alone.

``--kills``: an audit of a run whose parts are killed. ``--demo``: two datasets with the demo model,
one of which img2dataset has made, and what the estimate of the other was worth.

The figures go into docs/datasets.md.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tools.docs.page import replace_section

from benchmarks import results
from benchmarks.datasets.demo import CHECKED, demo
from benchmarks.datasets.driver import rates

PAGE = Path(__file__).parents[2] / "docs" / "datasets.md"


def main() -> int:
    """Measures, keeps the figures, and writes a section."""
    parser = argparse.ArgumentParser("python -m benchmarks.datasets", description=__doc__)
    parser.add_argument("--rows", type=int, help="100,000, or 2,000 with the demo model")
    parser.add_argument("--kills", action="store_true", help="kill command, workers and Redis")
    parser.add_argument("--demo", action="store_true", help="with the demo model")
    arguments = parser.parse_args()
    name = "kills" if arguments.kills else "demo" if arguments.demo else "rates"
    rows = arguments.rows or (2_000 if arguments.demo else 100_000)
    options = "" if name == "rates" else f" --{name}"
    found = results.measure(
        f"datasets-{name}",
        lambda: _measured(rows, name),
        command=f"python -m benchmarks.datasets --rows {rows}{options}",
    )
    lines = [*text(name, found)]
    replace_section(PAGE, name, "\n".join(lines))
    print("\n".join(lines))
    return 1 if any(found.get("wrong", {}).values()) else 0


def _measured(rows: int, name: str) -> dict[str, Any]:
    if name == "kills":
        from benchmarks.datasets.kills import kills

        return kills(rows)
    return demo(rows) if name == "demo" else rates(rows)


def text(name: str, found: Mapping[str, Any]) -> Iterator[str]:
    """The section, in Markdown."""
    yield from {"rates": _rates, "kills": _kills, "demo": _demo}[name](found)
    yield from ("", results.source(f"datasets-{name}"))


def _rates(found: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"{found['rows']:,} rows of Parquet with a stand-in whose jobs end at once: "
        f"**{found['journal_per_s']:,.0f} rows a second** into the journal, "
        f"{found['parquet_per_s']:,.0f} on to answered shards; for a second of CPU time "
        f"{found['journal_per_cpu_s']:,.0f} and {found['parquet_per_cpu_s']:,.0f}."
    )


def _kills(found: Mapping[str, Any]) -> Iterator[str]:
    killed, wrong = found["killed"], found["wrong"]
    yield (
        f"{found['rows']:,} rows; the command killed {killed['command']} times, workers "
        f"{killed['worker']} times, Redis once: {found['s']:,.0f} s, at most "
        f"{found['most_open']:,} open jobs (window {found['window']:,}), "
        f"{found['mib']} MiB in the command."
    )
    yield ""
    yield ", ".join(f"{what} {count}" for what, count in wrong.items()) + "."


def _demo(found: Mapping[str, Any]) -> Iterator[str]:
    tables, tars = found["parquet"], found["tars"]
    yield f"| of {found['rows']:,} rows of Parquet | expected | between | took | ratio |"
    yield "|---|---|---|---|---|"
    for name, key in (("seconds", "s"), ("GPU-seconds", "gpu_s")):
        middle, low, high = tables["expected"]["run_s" if key == "s" else key]
        took = tables["took"][key]
        yield (
            f"| {name}, behind the sample | {middle:.1f} | {low:.1f} and {high:.1f} | {took:.1f} "
            f"| **{middle / took:.2f}** |"
        )
    yield ""
    counts = ("rows", "keys", "with an answer")
    for source, part, reader in (("Parquet", tables, "duckdb"), ("tars", tars, "webdataset")):
        read = ", ".join(f"{n:,} {what}" for n, what in zip(part["found"], counts, strict=True))
        yield f"- {reader} finds in the answers of the {source}: {read}."
    yield f"- Of {CHECKED} rows, {tables['unlike single jobs']} have another text than a job alone."


if __name__ == "__main__":
    sys.exit(main())
