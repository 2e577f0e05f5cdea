"""What the lists by which jobs are found cost Redis: ``python -m benchmarks.lists``.

Jobs as those of ``benchmarks.cost``, from submit to result, on two stacks in turns: one with the
ledger's scripts as they are, and one whose scripts put nothing into lists and take nothing out. Of
the differences of neighbouring turns in Redis' CPU time the median counts.
"""

import argparse
import operator
import re
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from tools.docs.page import replace_section

from benchmarks import results
from benchmarks.cost import from_submit_to_result, work
from benchmarks.overhead import AT_ONCE, THREADS
from blipq.contract import ImageRef
from blipq.ledger.scripts import runner
from blipq_worker.bench.stack import Stack, running

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
#: Jobs of a turn, and of those before the first.
JOBS, WARM = 250, 1_100
#: Nobody reads it.
IMAGE = ImageRef(uri="s3://photos/cat.jpg")
_CALLS = re.compile(r"^ *(?:un)?list_job\(.*\n", re.M)


@contextmanager
def without_lists() -> Iterator[None]:
    """Ledgers that are made meanwhile, and make their first calls, leave the lists alone."""
    text = runner.script_text

    def shortened(*names: str, noted: bool = False) -> str:
        return _CALLS.sub("", text(*names, noted=noted))

    runner.script_text = shortened  # type: ignore[assignment]
    try:
        yield
    finally:
        runner.script_text = text


def measured(rounds: int) -> dict[str, Any]:
    """Microseconds of Redis' CPU a job, with lists, without, and the difference."""
    with running() as listed, running() as bare:
        stacks = {"with_us": listed, "without_us": bare}
        begin(listed)
        with without_lists():
            begin(bare, "--without-lists")
        found: dict[str, list[float]] = {name: [] for name in stacks}
        for number in range(rounds):
            for name in list(stacks)[:: -1 if number % 2 else 1]:
                before = _cpu_us(stacks[name])
                from_submit_to_result(stacks[name], IMAGE, JOBS)
                found[name].append((_cpu_us(stacks[name]) - before) / JOBS)
        kept = [stack.client.ledger.redis.exists("blipq:lists") for stack in stacks.values()]
        assert kept == [1, 0], "one has lists"
    differences = map(operator.sub, *found.values())
    return {
        "rounds": rounds,
        "jobs": JOBS,
        **{name: statistics.median(each) for name, each in found.items()},
        "lists_us": statistics.median(differences),
    }


def begin(stack: Stack, *options: str) -> None:
    """A worker, and jobs until every cache is warm."""
    environment = {**AT_ONCE, "BENCH_FETCH": "0", "BLIPQ_CONCURRENCY": str(THREADS)}
    stack.start_workers(
        environment, [sys.executable, "-m", "benchmarks.lists", "--worker", *options]
    )
    from_submit_to_result(stack, IMAGE, WARM)


def _cpu_us(stack: Stack) -> float:
    info: Any = stack.client.ledger.redis.info("cpu")
    return 1e6 * (float(info["used_cpu_user"]) + float(info["used_cpu_sys"]))


def text(found: dict[str, Any]) -> str:
    """The figures in a sentence or two."""
    return (
        f"From submit to result a job takes {found['with_us']:.0f} us of Redis' CPU, and "
        f"{found['lists_us']:.1f} us less without lists: "
        f"**{found['lists_us'] / found['with_us']:.1%}** of it. Medians of "
        f"{found['rounds']} rounds of {found['jobs']:,} jobs, with lists and without in turns."
    )


def main() -> int:
    """Measures, keeps the figures, and writes them into docs/performance.md."""
    parser = argparse.ArgumentParser("python -m benchmarks.lists", description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--without-lists", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        with without_lists() if options.without_lists else nullcontext():
            return work()
    found = results.measure(
        "lists",
        lambda: measured(options.rounds),
        command=f"python -m benchmarks.lists --rounds {options.rounds}",
    )
    lines = [text(found), "", results.source("lists")]
    replace_section(PAGE, "lists", "\n".join(lines))
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
