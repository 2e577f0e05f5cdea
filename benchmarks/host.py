"""What the host loses of a fast device: the service with a device that only takes its time."""

import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from benchmarks.gpu import fake, service, weights

#: A worker's settings by its slots: as it comes, and with all that fills 128 slots.
SETTINGS: dict[int, dict[str, str]] = {
    32: {},
    128: {
        "BLIPQ_CONCURRENCY": "256",
        "BLIPQ_MAX_BATCH_SIZE": "64",
        "BLIPQ_DECODE_THREADS": "12",
    },
}
WARM_S, SAMPLES_A_SECOND = 3.0, 50
#: Whose CPU a thread's is, by the beginning of its name; jobs' threads are shared out by samples.
THREADS = {"blipq-batcher": "the model's thread", "MainThread": "Celery's consumer"}
JOBS = "ThreadPoolExecutor"
#: What a job's thread does: the first part of which any text stands in its stack.
PARTS: dict[str, tuple[str, ...]] = {
    "JPEG, resize, normalise": ("blipq/images/decoding.py", "blipq_worker/catalog/resize.py"),
    "S3": ("blipq_worker/images/fetch.py",),
    "ledger": ("blipq/ledger/",),
    "Celery around a job": ("",),
}
#: Innermost functions of threads that wait, whatever the sampler takes them for.
WAITING = ("Condition.wait (", "Semaphore.acquire (", "concurrent/futures/thread.py", "do_poll (")
WAITING += ("_read_from_socket (", "SocketIO.readinto (", "select (")
REST = "the rest"
ALL_PARTS = (*THREADS.values(), *PARTS, REST)


def host(seconds: int) -> dict[str, Any]:
    """Jobs a second by how the device is driven and by slots, and a worker's CPU by part."""
    with tempfile.TemporaryDirectory() as folder:
        model = weights.write_folder(Path(folder) / "model", "opt-2.7b")
        return {
            f"{how}, {slots} slots": _measured(how, slots, model, seconds)
            for how in fake.STEP_S
            for slots in SETTINGS
        }


def _measured(how: fake.How, slots: int, model: str, seconds: int) -> dict[str, Any]:
    work = service.Work(service.GREEDY, "coco", seconds)
    with tempfile.TemporaryDirectory() as folder:
        bench = service.Bench(
            Path(folder),
            {"BLIPQ_MODELS": f"default={model}", **SETTINGS[slots]},
            [sys.executable, "-m", "benchmarks.gpu.fake", how, str(slots)],
            {"greedy": work},
        )
        with bench.running():
            bench.start_worker()
            account = _Account(bench.worker.pid or 0, bench.folder, seconds)
            try:
                found = bench.backlog("greedy")
                parts = account.parts()
            finally:
                bench.stop_worker()
    allowed = fake.allowed_per_s(how, slots, service.TOKENS)
    spent = found["cpu_ms_a_job"]["worker"]
    return found | {
        "allowed_per_s": allowed,
        "worker_ms_by_part": {part: spent * parts[part] for part in ALL_PARTS},
    }


class _Account(threading.Thread):
    """Shares of a worker's CPU while it has a backlog: by thread, and by samples within jobs."""

    def __init__(self, pid: int, folder: Path, seconds: int) -> None:
        super().__init__()
        self._pid, self._stacks = str(pid), folder / "stacks.txt"
        self._seconds = max(1, int(seconds - 2 * WARM_S))
        self._shares: Counter[str] = Counter()
        self.start()

    def parts(self) -> Counter[str]:
        """The shares, once the worker was watched."""
        self.join()
        return self._shares

    def run(self) -> None:
        """Watches the worker once it is warm."""
        time.sleep(WARM_S)
        names, before = self._names(), self._cpu_s()
        self._py_spy("record", "--format", "raw", "--threads", "--full-filenames")
        spent = {id: each - before.get(id, 0.0) for id, each in self._cpu_s().items()}
        by_part: Counter[str] = Counter()
        for id, seconds in spent.items():
            by_part[_owner(names.get(id, ""))] += seconds
        jobs, samples = by_part.pop(JOBS, 0.0), self._samples()
        for part in PARTS:
            by_part[part] = jobs * samples[part] / max(1, samples.total())
        for part, seconds in by_part.items():
            self._shares[part] = seconds / sum(by_part.values())

    def _names(self) -> dict[int, str]:
        """Python's threads by the system's number."""
        dumped = subprocess.run(
            [_PY_SPY, "dump", "--pid", self._pid], check=True, capture_output=True, text=True
        )
        lines = re.findall(r'^Thread (\d+) \(.*?\): "(.*)"', dumped.stdout, re.MULTILINE)
        return {int(id): name for id, name in lines}

    def _cpu_s(self) -> dict[int, float]:
        threads = psutil.Process(int(self._pid)).threads()
        return {each.id: each.user_time + each.system_time for each in threads}

    def _py_spy(self, *command: str) -> None:
        options = ["--rate", str(SAMPLES_A_SECOND), "--duration", str(self._seconds)]
        options += ["--output", str(self._stacks), "--pid", self._pid]
        subprocess.run([_PY_SPY, *command, *options], check=True, capture_output=True)

    def _samples(self) -> Counter[str]:
        """How often a job's thread was found at work in each part."""
        found: Counter[str] = Counter()
        for line in self._stacks.read_text().splitlines():
            frames, _, count = line.rpartition(" ")
            innermost = frames.rpartition(";")[2]
            if JOBS in frames and not any(each in innermost for each in WAITING):
                found[_part(frames)] += int(count)
        return found


_PY_SPY = str(Path(sys.executable).with_name("py-spy"))


def _owner(name: str) -> str:
    """The part whose CPU a thread of this name takes."""
    owners = {**THREADS, JOBS: JOBS}
    return next((owners[each] for each in owners if name.startswith(each)), REST)


def _part(frames: str) -> str:
    return next(part for part, texts in PARTS.items() if any(text in frames for text in texts))


def rows(found: Mapping[str, Any]) -> list[list[str]]:
    """A line of the table for each way."""
    return [
        [
            name,
            f"{each['allowed_per_s']:.0f}",
            f"{each['per_s']:.0f}",
            f"**{each['per_s'] / each['allowed_per_s']:.2f}**",
            f"{each['cores_busy']:.2f}",
            *(f"{each['worker_ms_by_part'][part]:.1f}" for part in ALL_PARTS),
            f"{each['cpu_ms_a_job']['worker']:.1f}",
        ]
        for name, each in found.items()
    ]


HEAD = ["device", "it allows, jobs/s", "served", "share", "cores busy", *ALL_PARTS, "in all, ms"]
