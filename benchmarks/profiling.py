"""Where the model's thread is, and who holds Python's lock, as py-spy sees one busy worker."""

import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.latency import BACKLOG, HELD, seen_by
from benchmarks.photos import pictures
from benchmarks.throughput import PROCESSES, environment
from blipq.contract import Status
from blipq_worker.bench.stack import Stack, running
from blipq_worker.bench.workloads import GREEDY, LOADS

BATCHER = "blipq-batcher"
#: Where a thread is: the first part of which any text stands in its stack.
PARTS: dict[str, tuple[str, ...]] = {
    "waits for a job": ("Batcher._wait (",),
    "the model: images": ("blip2/vision/features.py",),
    "the model: prompts": ("prefill (",),
    "the model: tokens": ("blip2/decoding/",),
    "between them": (BATCHER,),
    "JPEG, resize, normalise": ("blipq/images/decoding.py", "blipq_worker/catalog/resize.py"),
    "S3": ("blipq_worker/images/fetch.py",),
    "ledger": ("blipq/ledger/",),
    "a job, between them": ("blipq_worker/jobs/",),
    "Celery and the rest": ("",),
}
#: Samples a second: few, as the worker stands still for each of them.
RATE, WARM_S, JOBS_A_SECOND = 20, 2, 25


def profile(seconds: int) -> dict[str, Any]:
    """Shares of the time, by where a thread is. The model's thread runs or waits for the lock.

    The mid-size model writes captions: of 20 tokens and new images while a backlog waits, and of 5
    to 50 about seen images that arrive at 60 % of what it can. seconds: of each recording.
    """
    return {**_backlog(seconds), "the model's thread at 60 %": _arriving(seconds)}


def _backlog(seconds: int) -> dict[str, dict[str, float]]:
    jobs = JOBS_A_SECOND * PROCESSES * (2 * seconds + WARM_S)
    with running() as stack:
        stack.start_workers(environment(), processes=PROCESSES)
        images = stack.upload(pictures(11).take(jobs))
        submitted = stack.client.submit_many(list(GREEDY.requests(images)))
        time.sleep(WARM_S)
        found = {
            "the model's thread": _recorded(stack, seconds, "--idle", only=BATCHER),
            "holding Python's lock": _recorded(stack, seconds, "--gil"),
        }
        assert submitted[-1].info().status is Status.QUEUED, "the backlog did not last"
        return found


def _arriving(seconds: int) -> dict[str, float]:
    with running() as stack:
        served = {"BLIPQ_MODELS": environment()["BLIPQ_MODELS"].replace("default", "joining")}
        stack.start_workers(environment() | served, processes=PROCESSES)
        work = seen_by(stack, pictures(12), ["joining"])
        capacity = stack.backlog(work(BACKLOG), "joining").steady_per_s(HELD * PROCESSES)
        per_s = LOADS["60 %"] * capacity
        with ThreadPoolExecutor(1) as client:
            jobs = work(round(per_s * (seconds + 2 * WARM_S)))
            ended = client.submit(stack.arriving, jobs, per_s, "joining")
            time.sleep(WARM_S)
            found = _recorded(stack, seconds, "--idle", only=BATCHER)
            ended.result()
        return found


def _recorded(stack: Stack, seconds: int, *options: str, only: str = "") -> dict[str, float]:
    path = stack.folder / "stacks.txt"
    py_spy = str(Path(sys.executable).with_name("py-spy"))
    command = [py_spy, "record", "--format", "raw", "--threads", "--full-filenames"]
    command += ["--rate", str(RATE), "--duration", str(seconds), "--output", str(path)]
    pid = str(stack.workers[0].pid)
    subprocess.run([*command, *options, "--pid", pid], check=True, capture_output=True)
    seen: Counter[str] = Counter()
    for line in path.read_text().splitlines():
        frames, _, count = line.rpartition(" ")
        if only in frames:
            seen[_part(frames)] += int(count)
    return {part: seen[part] / (RATE * seconds) for part in PARTS if part in seen}


def _part(frames: str) -> str:
    return next(part for part, texts in PARTS.items() if any(text in frames for text in texts))
