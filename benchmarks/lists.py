"""What the lists by which jobs are found cost Redis: ``python -m benchmarks.lists``.

Jobs are submitted, claimed and ended through the ledger: a block of them with its scripts as they
are, and the next one with scripts that put nothing into lists and take nothing out. Of the
differences of neighbouring blocks in Redis' CPU time the median counts.
"""

import argparse
import re
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tools.docs.page import replace_section

from benchmarks import results
from blipq.contract import CaptionRequest, Options
from blipq.ledger.connection import connect
from blipq.ledger.scripts import runner
from blipq.ledger.worker import Claim, WorkerLedger
from blipq.settings import Settings
from blipq.submission import Submission, new_id
from blipq_worker.bench.stack import running

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
BLOCK = 100
RESULT = '{"kind": "caption", "captions": [{"text": "a text"}]}'
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


def through(ledger: WorkerLedger) -> None:
    """A block of jobs from submit to outcome."""
    ids = [new_id() for _ in range(BLOCK)]
    for id in ids:
        request = CaptionRequest(image="s3://photos/cat.jpg", prompt=f"number {id}")
        ledger.submit(Submission(request, Options(), id), notify="client")
    claims = [ledger.claim(id, "worker") for id in ids]
    for claim in claims:
        assert isinstance(claim, Claim)
        assert ledger.succeed(claim, RESULT, "{}")


def measured(blocks: int) -> dict[str, Any]:
    """Microseconds of Redis' CPU a job, with lists, without, and the difference."""
    with running() as stack:
        settings: Settings = stack.client.settings
        ledgers = [WorkerLedger(connect(settings), settings) for _ in range(2)]
        ledgers[0].register("worker", ["default"], "{}", ttl_s=3_600, spare=False)
        through(ledgers[0])
        with without_lists():
            through(ledgers[1])
        assert ledgers[0].redis.exists("blipq:lists")
        used = [[_used_us(ledger, through) for ledger in ledgers] for _ in range(blocks)]
    both = [statistics.median(each) for each in zip(*used, strict=True)]
    return {
        "blocks": blocks,
        "with_us": both[0],
        "without_us": both[1],
        "lists_us": statistics.median(first - second for first, second in used),
    }


def _used_us(ledger: WorkerLedger, run: Callable[[WorkerLedger], None]) -> float:
    before = _cpu_us(ledger)
    run(ledger)
    return (_cpu_us(ledger) - before) / BLOCK


def _cpu_us(ledger: WorkerLedger) -> float:
    info: Any = ledger.redis.info("cpu")
    return 1e6 * (float(info["used_cpu_user"]) + float(info["used_cpu_sys"]))


def text(found: dict[str, Any]) -> str:
    """The figures in a sentence or two."""
    cost = (results.load("cost") or {"found": {"redis_us": {"now": found["with_us"]}}})["found"]
    whole = cost["redis_us"]["now"]
    mine = found["lists_us"] / found["with_us"]
    return (
        f"Submit, claim and outcome of a job, each a call alone, take {found['with_us']:.0f} us of "
        f"Redis' CPU, and {found['lists_us']:.1f} us less without lists: **{mine:.1%}** of it, and "
        f"{found['lists_us'] / whole:.1%} of the {whole:.0f} us of a job in the table above."
    )


def main() -> None:
    """Measures, keeps the figures, and writes them into docs/performance.md."""
    parser = argparse.ArgumentParser("python -m benchmarks.lists", description=__doc__)
    parser.add_argument("--blocks", type=int, default=100, help="of 100 jobs, of each kind")
    options = parser.parse_args()
    found = results.measure(
        "lists",
        lambda: measured(options.blocks),
        command=f"python -m benchmarks.lists --blocks {options.blocks}",
    )
    lines = [text(found), "", results.source("lists")]
    replace_section(PAGE, "lists", "\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
