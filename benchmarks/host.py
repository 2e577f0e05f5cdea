"""What the host loses of a fast device: the service with a device that only takes its time.

In one process, and with fronts: ``BLIPQ_FRONTS``, of which the first is watched.
"""

import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.gpu import fake, pictures, service, weights
from benchmarks.processes import of_worker

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
DECODING = "JPEG, resize, normalise"
#: Of the worker in the second half of the cases: as many as it shall have cores.
FRONTS = 2
#: Whose CPU a thread's is, by the beginning of its name; jobs' threads are shared out by samples.
THREADS = {
    "blipq-batcher": "the model's thread",
    "MainThread": "Celery's consumer",
    "blipq-engine-client": "inference",
}
JOBS = "ThreadPoolExecutor"
#: What a job's thread does: the first part of which any text stands in its stack.
PARTS: dict[str, tuple[str, ...]] = {
    DECODING: ("blipq/images/decoding.py", "blipq_worker/catalog/resize.py"),
    "S3": ("blipq_worker/images/fetch.py",),
    "ledger": ("blipq/ledger/",),
    "inference": ("blipq_worker/inference/",),
    "Celery around a job": ("",),
}
#: Innermost functions of threads that wait, whatever the sampler takes them for.
WAITING = ("Condition.wait (", "Semaphore.acquire (", "concurrent/futures/thread.py", "do_poll (")
WAITING += ("_read_from_socket (", "SocketIO.readinto (", "select (")
REST = "the rest"
ALL_PARTS = ("the model's thread", "Celery's consumer", *PARTS, REST)


@dataclass(frozen=True)
class Case:
    """How the device is driven, its slots, the worker's fronts, and the size of the pictures."""

    how: fake.How
    slots: int
    fronts: int = 0
    size: str = "coco"

    @property
    def about(self) -> str:
        """In words."""
        form = f"{self.fronts} fronts" if self.fronts else "one process"
        width, height = pictures.SIZES[self.size]
        return f"{self.how}, {self.slots} slots, {form}, {width} x {height}"


CASES = (
    Case("captured", 32),
    Case("captured", 32, FRONTS),
    Case("captured", 128),
    Case("captured", 128, FRONTS),
    Case("launches", 32),
    Case("launches", 32, FRONTS),
    Case("captured", 128, FRONTS, "2mp"),
    Case("captured", 128, FRONTS, "12mp"),
)


def host(seconds: int) -> dict[str, Any]:
    """Jobs a second by case, and a worker's CPU by part."""
    with tempfile.TemporaryDirectory() as folder:
        model = weights.write_folder(Path(folder) / "model", "opt-2.7b")
        return {case.about: _measured(case, model, seconds) for case in CASES}


def _measured(case: Case, model: str, seconds: int) -> dict[str, Any]:
    environment = {"BLIPQ_MODELS": f"default={model}", "BLIPQ_FRONTS": str(case.fronts)}
    with tempfile.TemporaryDirectory() as folder:
        bench = service.Bench(
            Path(folder),
            environment | SETTINGS[case.slots],
            [sys.executable, "-m", "benchmarks.gpu.fake", case.how, str(case.slots)],
            {"greedy": service.Work(service.GREEDY, case.size, seconds)},
        )
        with bench.running():
            try:
                bench.start_worker()
                account = _Account(bench.worker.pid or 0, bench.folder, seconds)
                found = bench.backlog("greedy")
                parts = account.parts()
            finally:
                bench.stop_worker()
    spent = found["cpu_ms_a_job"]["worker"]
    return found | {
        "allowed_per_s": fake.allowed_per_s(case.how, case.slots, service.TOKENS),
        "worker_ms_by_part": {part: spent * parts[part] for part in ALL_PARTS},
    }


class _Account(threading.Thread):
    """Shares of a worker's CPU while it has a backlog: by process, by thread, by samples in jobs.

    Of several fronts one is watched: all do the same.
    """

    def __init__(self, pid: int, folder: Path, seconds: int) -> None:
        super().__init__()
        self._processes = of_worker(pid)
        self._watched = (self._processes.get("front") or self._processes["main"])[0].pid
        self._stacks = folder / "stacks.txt"
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
        names, before, others = self._names(), self._cpu_s(), self._others_s()
        self._py_spy("record", "--format", "raw", "--threads", "--full-filenames")
        spent = {id: each - before.get(id, 0.0) for id, each in self._cpu_s().items()}
        by_part: Counter[str] = Counter()
        for id, seconds in spent.items():
            by_part[_owner(names.get(id, ""))] += seconds
        jobs, samples = by_part.pop(JOBS, 0.0), self._samples()
        for part in PARTS:
            by_part[part] += jobs * samples[part] / max(1, samples.total())
        fronts = len(self._processes.get("front", [])) or 1
        for part in by_part:
            by_part[part] *= fronts
        for part, seconds in self._others_s().items():
            by_part[part] += seconds - others[part]
        for part, seconds in by_part.items():
            self._shares[part] = seconds / sum(by_part.values())

    def _others_s(self) -> dict[str, float]:
        """CPU seconds of the processes around fronts: of the engine, and of the main one."""
        if "front" not in self._processes:
            return {}
        parts = {"the model's thread": "engine", REST: "main"}
        return {
            part: sum(sum(each.cpu_times()[:2]) for each in self._processes[name])
            for part, name in parts.items()
        }

    def _names(self) -> dict[int, str]:
        """Python's threads by the system's number."""
        dumped = subprocess.run(
            [_PY_SPY, "dump", "--pid", str(self._watched)],
            check=True,
            capture_output=True,
            text=True,
        )
        lines = re.findall(r'^Thread (\d+) \(.*?\): "(.*)"', dumped.stdout, re.MULTILINE)
        return {int(id): name for id, name in lines}

    def _cpu_s(self) -> dict[int, float]:
        threads = psutil.Process(self._watched).threads()
        return {each.id: each.user_time + each.system_time for each in threads}

    def _py_spy(self, *command: str) -> None:
        options = ["--rate", str(SAMPLES_A_SECOND), "--duration", str(self._seconds)]
        options += ["--output", str(self._stacks), "--pid", str(self._watched)]
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
    """A line of the table for each case."""
    return [
        [
            name,
            f"{each['allowed_per_s']:.0f}",
            f"{each['per_s']:.0f}",
            f"**{each['per_s'] / each['allowed_per_s']:.2f}**",
            f"{each['cores_busy']:.2f}",
            *(f"{each['worker_ms_by_part'].get(part, 0.0):.1f}" for part in ALL_PARTS),
            f"{_elsewhere_ms(each):.1f}",
            f"{each['cpu_ms_a_job']['worker'] / 10:.1f}",
        ]
        for name, each in found.items()
    ]


def _elsewhere_ms(found: Mapping[str, Any]) -> float:
    """Milliseconds of a job on a front, or in its place: all but the engine and the decoding."""
    parts = found["worker_ms_by_part"]
    return float(sum(parts.values()) - parts["the model's thread"] - parts[DECODING])


HEAD = ["device, worker and pictures", "it allows, jobs/s", "served", "share", "cores busy"]
HEAD += [*ALL_PARTS, "all but model and decoding, ms", "cores for 100 jobs/s"]
