"""``python -m benchmarks.datasets``: rows a second of the command alone.

``--kills``: tars of img2dataset's in a run whose parts are killed, and an audit. ``--demo``: two
datasets with the demo model, and what the estimate of the first was worth. Both need
``make peers``.

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
    killed, parts = found["killed"], {"Parquet": found["parquet"], "tars": found["tars"]}
    yield (
        f"{found['rows']:,} rows in img2dataset's tars; the command killed {killed['command']} "
        f"times, workers {killed['worker']} times, Redis once while answers were written to "
        f"Parquet. Then `--update` wrote them to tars. The window is {found['window']:,} jobs."
    )
    yield ""
    yield (
        "| answers in | seconds | jobs | most open jobs | most jobs in Redis "
        "| command's MiB after a tenth | at the end | most |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for name, part in parts.items():
        figures = (part["s"], part["jobs"], part["most_open"], part["most_records"])
        cells = (*figures, *(part["mib"][when] for when in ("tenth", "end", "most")))
        yield f"| {name} | {' | '.join(f'{each:,.0f}' for each in cells)} |"
    yield ""
    yield _read("duckdb finds in the Parquet", parts["Parquet"])
    yield _read("webdataset finds in the tars", parts["tars"])
    yield f"- Wrong: {', '.join(f'{what} {count:,}' for what, count in found['wrong'].items())}."


def _read(begin: str, part: Mapping[str, Any]) -> str:
    """What another reader finds in answers."""
    counts = ", ".join(f"{count:,} {what}" for what, count in part["found"].items())
    return f"- {begin}: {counts}."


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
    yield _read("duckdb finds in the answers of the Parquet", tables)
    yield _read("webdataset finds in the answers of the tars", tars)
    yield f"- Of {CHECKED} rows, {tables['unlike single jobs']} have another text than a job alone."


if __name__ == "__main__":
    sys.exit(main())
