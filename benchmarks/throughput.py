"""Images a second: the bare engine, the whole service and the peers, on the same jobs."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.models import mid_size
from benchmarks.overhead import SLEEPING
from benchmarks.peers.run import PEERS, PYTHON, Rows, run_peer
from benchmarks.photos import pictures
from blipq.contract import ImageRef
from blipq_worker.bench.pictures import Pictures
from blipq_worker.bench.run import Bench
from blipq_worker.bench.stack import BenchError, Stack, running
from blipq_worker.bench.workloads import DEFAULT, GREEDY, MIXED, TEN, WORKLOADS, Workload
from blipq_worker.process.fleet import cores

#: Of the jobs: where each asks ten questions, and for peers that take one image at a time.
TEN_SHARE, ALONE_SHARE = 4, 4
#: How many times as many jobs the service gets as the bare engine.
SERVICE_SHARE = 2
ALONE = ("usual_script", "celery_plain")
#: Peers' batches. A run of fewer jobs than LONG tries the first, asks only SHORT_ROWS, and
#: leaves out the loop without a queue.
SIZES, LONG = (16, 32), 96
#: Jobs on images that the worker has seen; peers look again.
SEEN = replace(MIXED, name="seen-5-50", about="caption, greedy, 5 to 50 tokens, image seen before")
ROWS = (DEFAULT, GREEDY, MIXED, TEN, SEEN)
SHORT_ROWS = (GREEDY, TEN)
DEMO = {"BLIPQ_MODELS": "default=demo"}
#: Workers, and bare engines, with a core each: see the page's section on workers.
PROCESSES = 1 if torch.cuda.is_available() else cores()


def environment(dtype: str = "auto") -> dict[str, str]:
    """A worker's settings for the mid-size model. Random weights would not pass the canary."""
    return {
        "BLIPQ_MODELS": f"default={mid_size()}",
        "BLIPQ_CANARY": "0",
        "BLIPQ_DTYPE": dtype,
    }


def bare(jobs: int) -> dict[str, Any]:
    """The ceiling and the service, for both models at their default precision."""
    source = pictures(1)
    found = {
        name: _both(Bench(settings, source, jobs, processes=PROCESSES))
        for name, settings in (("mid-size", environment()), ("demo", DEMO))
    }
    alone = Bench(environment(), source.again(), jobs)
    found["mid-size"]["one worker"] = alone.through((GREEDY, MIXED))
    return found | {"elsewhere": _elsewhere(found["mid-size"]["bare"], source, jobs)}


def _both(bench: Bench) -> dict[str, Any]:
    """More jobs through the service, as its workers do not begin and end a batch together."""
    service = replace(bench, pictures=bench.pictures.again(), jobs=SERVICE_SHARE * bench.jobs)
    again = replace(bench, pictures=bench.pictures.again())
    return {"bare": again.ceilings(WORKLOADS), "service": service.through(WORKLOADS)}


def _elsewhere(bare: dict[str, Any], source: Pictures, jobs: int) -> dict[str, Any]:
    """As if the mid-size model ran on a device of its own: its time on an image is slept.

    Images are read from S3, decoded and made ready as for the model.
    """
    rates = {row.name: bare[row.name]["images_per_s"] for row in (DEFAULT, GREEDY, MIXED)}
    service = {}
    for row in (DEFAULT, GREEDY, MIXED):
        settings = {
            "BENCH_CHECKPOINT": mid_size().split("+")[0],
            "BLIPQ_MODELS": f"default=0+{1000 / rates[row.name]}",
        }
        service |= Bench(settings, source.again(), jobs, SLEEPING).through([row])
    slept = {name: {"images_per_s": rate, "loop": "slept"} for name, rate in rates.items()}
    return {"bare": slept, "service": service}


def peers(jobs: int, *, names: Sequence[str] = ()) -> dict[str, Any]:
    """Every peer, and blipq in the peers' precision and in its own; rows by name."""
    if not PYTHON.exists():
        raise BenchError("the peers are not installed: make peers")
    asked, sizes = (ROWS, SIZES) if jobs >= LONG else (SHORT_ROWS, SIZES[:1])
    chosen = [name for name in PEERS if jobs >= LONG or name != "batches_loop"]
    source = pictures(3)
    with running() as stack:

        def images(row: Workload) -> tuple[list[ImageRef], list[ImageRef]]:
            share = TEN_SHARE if row is TEN else 1
            warm, work = (max(4, each // share) for each in (sizes[-1], jobs))
            return stack.upload(source.take(warm)), stack.upload(source.take(work))

        # Peers look again at an image that they have seen: as with new ones.
        rows = {row: images(row) for row in asked if row is not SEEN}
        few = {row: _few(*each) for row, each in rows.items()}
        by_system = {
            name: run_peer(
                name,
                stack,
                few if name in ALONE else rows,
                model=mid_size().split("+")[0],
                dtype="float32",
                batches=sizes,
            )
            for name in names or chosen
        }
        if SEEN in asked:
            rows[SEEN] = images(SEEN)
        for dtype in ("float32", "auto"):
            by_system[f"blipq {dtype}"] = _blipq(stack, rows, dtype)
    return {
        row.name: {name: found[row.name] for name, found in by_system.items() if row.name in found}
        for row in asked
    }


def _few(*images: list[ImageRef]) -> tuple[list[ImageRef], ...]:
    return tuple(each[: max(4, len(each) // ALONE_SHARE)] for each in images)


def _blipq(stack: Stack, rows: Rows, dtype: str) -> dict[str, Any]:
    """Through the queue, as the worker comes: no batch size is tried."""
    stack.start_workers(environment(dtype))
    found = {}
    for row, (warm, work) in rows.items():
        stack.backlog(list(row.requests(warm)))
        if row is SEEN:
            stack.backlog(list(row.requests(work, seed=7)))
        through = stack.backlog(list(row.requests(work)))
        found[row.name] = {"images_per_s": through.per_s, "stages_ms": through.stages()}
    stack.stop_workers()
    return found
