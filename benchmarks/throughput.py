"""Images a second: the bare engine, the whole service and the peers, on the same jobs."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks.models import mid_size
from benchmarks.peers.run import PEERS, PYTHON, run_peer
from benchmarks.photos import pictures
from blipq.contract import ImageRef
from blipq_worker.bench.run import Bench
from blipq_worker.bench.stack import Stack, running
from blipq_worker.bench.workloads import DEFAULT, GREEDY, MIXED, TEN, Workload

WARM, TEN_SHARE = 32, 4
#: Jobs on images that the worker has seen; peers look again.
SEEN = replace(MIXED, name="seen-5-50", about="caption, greedy, 5 to 50 tokens, image seen before")
ROWS = (DEFAULT, GREEDY, MIXED, TEN, SEEN)
DEMO = {"BLIPQ_MODELS": "default=demo"}


def environment(dtype: str = "auto") -> dict[str, str]:
    """A worker's settings for the mid-size model. Random weights would not pass the canary."""
    return {
        "BLIPQ_MODELS": f"default={mid_size()}",
        "BLIPQ_CANARY": "0",
        "BLIPQ_DTYPE": dtype,
    }


def bare(jobs: int) -> dict[str, Any]:
    """The ceiling and the service, for both models at their default precision."""
    found = {}
    for name, settings in (("mid-size", environment()), ("demo", DEMO)):
        rows: tuple[Workload, ...] = (DEFAULT, GREEDY, MIXED)
        found[name] = _both(Bench(settings, pictures(1), jobs), rows)
        few = Bench(settings, pictures(2), max(8, jobs // TEN_SHARE))
        for part, values in _both(few, (TEN,)).items():
            found[name][part] |= values
    return found


def _both(bench: Bench, rows: Sequence[Workload]) -> dict[str, Any]:
    return {"bare": bench.ceilings(rows), "service": bench.through(rows)}


def peers(jobs: int, *, names: Sequence[str] = ()) -> dict[str, Any]:
    """Every peer, and blipq in the peers' precision and in its own; rows by name."""
    if not PYTHON.exists():
        raise SystemExit("the peers are not installed: make peers")
    found: dict[str, Any] = {}
    source = pictures(3)
    with running() as stack:
        for row in ROWS:
            count = max(8, jobs // TEN_SHARE) if row is TEN else jobs
            images = [stack.upload(source.take(each)) for each in (WARM, count)]
            found[row.name] = {
                name: run_peer(
                    name, stack, row, (images[0], images[1]), model=_folder(), dtype="float32"
                )
                for name in names or PEERS
                if not (row is SEEN and name != "batches_loop")  # they look again: as before
            }
            found[row.name] |= {
                f"blipq {dtype}": _blipq(stack, row, images, dtype) for dtype in ("float32", "auto")
            }
    return found


def _folder() -> str:
    return mid_size().split("+")[0]


def _blipq(
    stack: Stack, row: Workload, images: Sequence[Sequence[ImageRef]], dtype: str
) -> dict[str, Any]:
    """Through the queue; a worker of its own each time, so that it has seen no image."""
    stack.start_worker(environment(dtype))
    stack.backlog(list(row.requests(images[0])))
    if row is SEEN:
        stack.backlog(list(row.requests(images[1], seed=7)))
    through = stack.backlog(list(row.requests(images[1])))
    stack.stop_workers()
    return {"images_per_s": through.per_s, "stages_ms": through.stages()}
