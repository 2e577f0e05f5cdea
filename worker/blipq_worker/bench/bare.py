"""The bare engine: the same model and pictures, read from disk, without queue, S3 and Redis.

``python -m blipq_worker.bench.bare FOLDER WORKLOAD...`` prints figures as JSON. It is a process of
its own, as a worker is, so that both have the machine for themselves.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from blipq.contract import Generation, Priority
from blipq_worker.bench.workloads import PROMPT, QUESTIONS, WORKLOADS, Workload
from blipq_worker.blip2 import Blip2, GenerateItem, resolve, vqa_prompt
from blipq_worker.engine import Engine
from blipq_worker.images import decode
from blipq_worker.load import load_models
from blipq_worker.settings import WorkerSettings

#: Batch sizes that are tried: the best one is the ceiling.
SIZES = (8, 16, 32)
DECODERS = 2

Work = Sequence[tuple[Path, Generation | None]]
Loop = Callable[[Workload, Work, int], None]


@dataclass(frozen=True)
class Bare:
    """The model, and the two loops that one would write around it."""

    model: Blip2
    options: WorkerSettings

    def in_batches(self, workload: Workload, work: Work, size: int) -> None:
        """Batch after batch; the next one is decoded while one runs."""
        with ThreadPoolExecutor(DECODERS) as decoders:
            ahead = 2 * size
            coming = [decoders.submit(self._item, workload, *each) for each in work[:ahead]]
            for start in range(0, len(work), size):
                items = [future.result() for future in coming[start : start + size]]
                more = work[ahead + start : ahead + start + size]
                coming += [decoders.submit(self._item, workload, *each) for each in more]
                self.model.generate(items)

    def fed(self, workload: Workload, work: Work, size: int) -> None:
        """Items join and leave the engine as a worker's do; ``size`` as in BLIPQ_MAX_BATCH_SIZE."""
        engine = Engine(
            {"default": self.model},
            max_batch_size=size,
            batch_wait_timeout_s=self.options.batch_wait_timeout_s,
            max_waiting=2 * size,
        )

        def run(path: Path, generation: Generation | None) -> None:
            item = self._item(workload, path, generation)
            engine.submit("default", item, Priority.NORMAL).result()

        engine.batcher.start()
        with ThreadPoolExecutor(2 * size) as threads:
            list(threads.map(lambda each: run(*each), work))
        engine.batcher.close(timeout=10)

    def _item(self, workload: Workload, path: Path, generation: Generation | None) -> GenerateItem:
        """A picture read, decoded and asked about."""
        pixels = self.model.preprocess(decode(path.read_bytes()))
        prompts = tuple(vqa_prompt(each) for each in QUESTIONS[: workload.questions])
        given = generation.model_dump(exclude_none=True) if generation else {}
        params = resolve("vqa" if prompts else "caption", self.model.info, given)
        return GenerateItem(pixels, prompts or (PROMPT,), params)


def ceiling(
    bare: Bare, workload: Workload, paths: "Iterator[Path]", count: int
) -> dict[str, object]:
    """The fastest loop and batch size, in images a second, and what each of them reached."""
    loops: dict[str, Loop] = {
        "batches": bare.in_batches,
        "joining": bare.fed,
    }
    rates: dict[str, float] = {}
    cpu_ms: dict[str, float] = {}
    for name, loop in loops.items():
        for size in SIZES:
            generations = workload.generations(count)
            warm = [(next(paths), each) for each in generations[:size]]
            work = [(next(paths), each) for each in generations]
            # On a thread of its own, whose helpers end with it: see load_models.
            with ThreadPoolExecutor(1) as thread:
                took, spent = thread.submit(timed, loop, workload, (warm, work), size).result()
            tried = f"{name} of {size}"
            rates[tried] = count / took
            cpu_ms[tried] = 1000 * spent / count
    best = max(rates, key=lambda each: rates[each])
    return {"images_per_s": rates[best], "loop": best, "cpu_ms": cpu_ms[best], "all": rates}


def timed(loop: Loop, workload: Workload, works: Sequence[Work], size: int) -> tuple[float, float]:
    """Seconds that the last of these works takes, and this process's CPU seconds in them."""
    for work in works:
        started, before = time.monotonic(), time.process_time()
        loop(workload, work, size)
    return time.monotonic() - started, time.process_time() - before


def main(folder: str, count: str, *names: str) -> None:
    """Prints the ceilings by workload."""
    options = WorkerSettings()
    (model,) = load_models(options).values()
    bare = Bare(model, options)
    paths = cycle(sorted(Path(folder).iterdir()))
    chosen = [each for each in WORKLOADS if each.name in names]
    print(json.dumps({each.name: ceiling(bare, each, paths, int(count)) for each in chosen}))


if __name__ == "__main__":
    main(*sys.argv[1:])
