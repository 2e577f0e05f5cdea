"""The engine here and at another commit, in turns: ``python -m benchmarks.against FOLDER``.

FOLDER is a checkout of the other commit with a virtual environment of its own in ``.venv``. Each
commit has an engine with the mid-size model in a process of its own; they do the same jobs in turn,
a second or two each, and the other one waits meanwhile: what else the machine does meets both. Of
the ratios of neighbouring turns the median counts, and an interval of 95 % for it, by their ranks.
"""

import argparse
import itertools
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
#: What is run in a turn: how many jobs of each kind.
TURNS = {"greedy captions": 8, "captions": 4, "ten questions": 2, "matches": 4}
_TIMEOUT_S = 120.0


class Side:
    """The engine of one checkout, in a process."""

    def __init__(self, folder: Path, checkpoint: str, threads: int) -> None:
        command = [str(folder / ".venv/bin/python"), __file__, "--engine", checkpoint]
        environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._read()

    def turn(self, kind: str) -> float:
        """Seconds that the jobs of a turn took."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{kind}\n")
        self._process.stdin.flush()
        return float(self._read())

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"an engine ended with {self._process.wait()}")
        return line


def serve(checkpoint: str) -> None:
    """Runs turns that are named on standard input; says how long each took."""
    import torch

    from benchmarks.photos import pictures
    from blipq.images.decoding import decode
    from blipq_worker.bench.workloads import QUESTIONS
    from blipq_worker.blip2 import Blip2
    from blipq_worker.catalog.params import resolve
    from blipq_worker.catalog.prompts import vqa_prompt
    from blipq_worker.engine.backend import Engine
    from blipq_worker.images.preprocess import pixels_of
    from blipq_worker.inference.local import LocalInference
    from blipq_worker.inference.requests import Generate, ImagePixels, Match

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model = Blip2.load(*checkpoint.split("+"), dtype="auto")
    engine = Engine(
        {"default": model}, max_batch_size=16, batch_wait_timeout_s=0.005, max_waiting=256
    )
    engine.batcher.start()
    inference, info = LocalInference(engine), model.info
    seen = [pixels_of(decode(data), info.recipes) for data in pictures(8).take(8)]
    long = {"max_new_tokens": 20, "min_new_tokens": 20}
    greedy, beams = (
        resolve("caption", info, {**long, **more}) for more in ({"num_beams": 1}, {"num_beams": 5})
    )
    short = resolve("vqa", info, {"num_beams": 1})
    questions = tuple(vqa_prompt(each) for each in QUESTIONS)
    texts = ("a red circle", "a dog on a beach", "a rocket", "a cup of coffee")
    made: Mapping[str, Callable[[ImagePixels], Any]] = {
        "greedy captions": lambda image: Generate(image, ("",), greedy),
        "captions": lambda image: Generate(image, ("",), beams),
        "ten questions": lambda image: Generate(image, questions, short),
        "matches": lambda image: Match(image, texts, "itm"),
    }

    def turn(kind: str) -> float:
        images = (ImagePixels(pixels=seen[number % len(seen)]) for number in range(TURNS[kind]))
        items = [made[kind](image) for image in images]
        started = time.monotonic()
        futures = [inference.submit("default", item, "normal") for item in items]
        done, late = wait(futures, _TIMEOUT_S)
        took = time.monotonic() - started
        assert not late
        assert not any(future.exception() for future in done)
        return took

    for kind in TURNS:
        turn(kind)
    print("ready", flush=True)
    for line in sys.stdin:
        print(turn(line.strip()), flush=True)


def ratios(sides: Sequence[Side], kind: str, rounds: int) -> Iterator[float]:
    """How much longer this commit took than the other, in each round; who begins alternates."""
    for number in range(rounds):
        order = [0, 1] if number % 2 else [1, 0]
        took = dict(zip(order, (sides[each].turn(kind) for each in order), strict=True))
        yield took[1] / took[0]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """An interval of 95 % for the median: two of the values, by the binomial distribution."""
    ordered, count = sorted(values), len(values)
    tails = itertools.accumulate(math.comb(count, below) / 2**count for below in range(count))
    out = max(0, sum(1 for tail in itertools.takewhile(lambda tail: tail <= 0.025, tails)) - 1)
    return ordered[out], ordered[-1 - out]


def compared(folder: Path, rounds: int, threads: int) -> dict[str, Any]:
    """For each kind the time of a turn here by that of a turn there, and which commit that was."""
    from benchmarks import results
    from benchmarks.models import mid_size

    checkpoint = mid_size()
    sides: list[Side] = []
    try:
        for each in (folder, ROOT):
            sides.append(Side(each, checkpoint, threads))
        kinds = {}
        for kind in TURNS:
            measured = list(ratios(sides, kind, rounds))
            least, most = interval(measured)
            kinds[kind] = {"time": statistics.median(measured), "from": least, "to": most}
            print(f"{kind}: {kinds[kind]['time']:.3f} ({least:.3f} to {most:.3f})", flush=True)
        return {"commit": results.commit(folder), "rounds": rounds, "kinds": kinds}
    finally:
        for side in sides:
            side.close()


def main() -> None:
    """Measures, and prints a line for each kind."""
    parser = argparse.ArgumentParser("python -m benchmarks.against", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", help="a checkout with a .venv of its own")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine:
        serve(options.engine)
    elif options.folder is None:
        parser.error("FOLDER: a checkout to compare with")
    else:
        from benchmarks import page, results

        results.measure(
            "against",
            lambda: compared(options.folder.resolve(), options.rounds, options.threads),
            command="python -m benchmarks.against FOLDER",
        )
        page.write()


if __name__ == "__main__":
    main()
