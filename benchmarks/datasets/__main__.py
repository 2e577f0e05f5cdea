"""``python -m benchmarks.datasets``: rows a second of the command alone; ``--kills`` for an audit.

The figures go into docs/datasets.md.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tools.docs.page import replace_section

from benchmarks import results
from benchmarks.datasets.driver import rates

PAGE = Path(__file__).parents[2] / "docs" / "datasets.md"


def main() -> int:
    """Measures, keeps the figures, and writes a section."""
    parser = argparse.ArgumentParser("python -m benchmarks.datasets", description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--kills", action="store_true", help="kill command, workers and Redis")
    arguments = parser.parse_args()
    name = "kills" if arguments.kills else "rates"
    command = f"python -m benchmarks.datasets --rows {arguments.rows}{' --kills' * arguments.kills}"
    found = results.measure(
        f"datasets-{name}",
        lambda: _measured(arguments.rows, kills=arguments.kills),
        command=command,
    )
    lines = [*text(name, found)]
    replace_section(PAGE, name, "\n".join(lines))
    print("\n".join(lines))
    return 1 if any(found.get("wrong", {}).values()) else 0


def _measured(rows: int, *, kills: bool) -> dict[str, Any]:
    if not kills:
        return rates(rows)
    from benchmarks.datasets.kills import kills as killed

    return killed(rows)


def text(name: str, found: Mapping[str, Any]) -> Iterator[str]:
    """The section, in Markdown."""
    yield from _rates(found) if name == "rates" else _kills(found)
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


if __name__ == "__main__":
    sys.exit(main())
