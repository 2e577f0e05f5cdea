"""The bare engine: the same model and pictures, read from disk, without queue, S3 and Redis.

``python -m blipq_worker.bench.bare FOLDER JOBS PROCESSES WORKLOAD...`` prints figures as JSON. Each
model is in a process of its own, as a worker is, so that both have the machine for themselves.
"""

import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from threading import Barrier, BrokenBarrierError

from blipq.contract import Generation
from blipq.images.decoding import decode
from blipq_worker.bench.workloads import PROMPT, QUESTIONS, WORKLOADS, Workload
from blipq_worker.blip2 import Blip2, GenerateItem
from blipq_worker.catalog.params import resolve
from blipq_worker.catalog.prompts import vqa_prompt
from blipq_worker.engine.backend import Engine
from blipq_worker.images.preprocess import pixels_of
from blipq_worker.inference.local import LocalInference
from blipq_worker.inference.requests import Generate, GenerationParams, ImagePixels
from blipq_worker.serving.loader import load_models
from blipq_worker.settings import WorkerSettings

#: Batch sizes that are tried: the best one is the ceiling.
SIZES = (16, 32)
DECODERS, WARM = 2, 8
#: Longest that a process waits for the others.
TIMEOUT_S = 900.0

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
            prompts, params = self._asked(workload, generation)
            pixels = pixels_of(decode(path.read_bytes()), self.model.info.recipes)
            item = Generate(ImagePixels(pixels=pixels), prompts, params)
            inference.submit("default", item, "normal").result()

        inference = LocalInference(engine)
        engine.batcher.start()
        with ThreadPoolExecutor(2 * size) as threads:
            list(threads.map(lambda each: run(*each), work))
        engine.batcher.close(timeout=10)

    def _item(self, workload: Workload, path: Path, generation: Generation | None) -> GenerateItem:
        """A picture read and decoded, and its request."""
        pixels = self.model.preprocess(decode(path.read_bytes()))
        return GenerateItem(pixels, *self._asked(workload, generation))

    def _asked(
        self, workload: Workload, generation: Generation | None
    ) -> tuple[tuple[str, ...], GenerationParams]:
        prompts = tuple(vqa_prompt(each) for each in QUESTIONS[: workload.questions])
        given = generation.model_dump(exclude_none=True) if generation else {}
        params = resolve("vqa" if prompts else "caption", self.model.info, given)
        return prompts or (PROMPT,), params


@dataclass(frozen=True)
class Tried:
    """A loop and batch size of one process: images a second, and its CPU seconds an image."""

    name: str
    images_per_s: float
    cpu_s: float


def tried(
    bare: Bare, workload: Workload, paths: Iterator[Path], count: int, together: Barrier
) -> Iterator[Tried]:
    """Each loop and batch size with ``count`` images; begun when all processes are ready."""
    loops: dict[str, Loop] = {"batches": bare.in_batches, "joining": bare.fed}
    for name, loop in loops.items():
        for size in SIZES:
            work, warm = (
                [(next(paths), each) for each in workload.generations(number)]
                for number in (count, WARM)
            )
            # On a thread of its own, whose helpers end with it: see load_models.
            with ThreadPoolExecutor(1) as thread:
                thread.submit(loop, workload, warm, size).result()
                together.wait(TIMEOUT_S)
                took_s, cpu_s = thread.submit(timed, loop, workload, work, size).result()
            yield Tried(f"{name} of {size}", count / took_s, cpu_s / count)


def timed(loop: Loop, workload: Workload, work: Work, size: int) -> tuple[float, float]:
    """Seconds that this work takes, and this process's CPU seconds in them."""
    started, before = time.monotonic(), time.process_time()
    loop(workload, work, size)
    return time.monotonic() - started, time.process_time() - before


def ceiling(processes: Sequence[Sequence[Tried]]) -> dict[str, object]:
    """The fastest loop and batch size, in images a second, and what each of them reached."""
    rates: dict[str, float] = {}
    cpu_ms: dict[str, float] = {}
    for same in zip(*processes, strict=True):
        name = same[0].name
        rates[name] = sum(each.images_per_s for each in same)
        cpu_ms[name] = 1000 * sum(each.cpu_s for each in same) / len(same)
    best = max(rates, key=lambda each: rates[each])
    return {"images_per_s": rates[best], "loop": best, "cpu_ms": cpu_ms[best], "all": rates}


def measured(
    folder: str, count: int, names: Sequence[str], share: slice, together: Barrier
) -> dict[str, list[Tried]]:
    """What one process finds, by workload. share: which of the pictures are its own."""
    try:
        options = WorkerSettings()
        (model,) = load_models(options).values()
        bare = Bare(model, options)
        paths = cycle(sorted(Path(folder).iterdir())[share])
        chosen = [each for each in WORKLOADS if each.name in names]
        return {
            each.name: list(tried(bare, each, paths, each.images(count), together))
            for each in chosen
        }
    except BaseException:
        together.abort()  # the others wait for this one
        raise


def main(folder: str, jobs: str, processes: str, *names: str) -> None:
    """Prints the ceilings by workload."""
    number = int(processes)
    shares = [slice(place, None, number) for place in range(number)]
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(number, spawned) as pool, spawned.Manager() as manager:
        together = manager.Barrier(number)
        found = [
            pool.submit(measured, folder, int(jobs) // number, names, share, together)
            for share in shares
        ]
        errors = [error for each in found if (error := each.exception()) is not None]
        # A broken barrier only follows from another process' error, which is raised first.
        for error in sorted(errors, key=lambda each: isinstance(each, BrokenBarrierError)):
            raise error
        by_process = [each.result() for each in found]
    print(json.dumps({name: ceiling([each[name] for each in by_process]) for name in names}))


if __name__ == "__main__":
    main(*sys.argv[1:])
