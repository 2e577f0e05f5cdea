"""What a socket between fronts and engine costs: ``python -m benchmarks split``.

The engine is real but for its device, which only takes the time of an H100 (docs/gpu.md) and holds
no GIL meanwhile. Fronts send 150 kB of pixels an item. Steps are timed where all slots are taken
and nobody joins or leaves: first with nobody connected, then with fronts that keep the device full.
Then fronts work so long on each item that they are the bound: once with this engine, once with one
that answers at once. What these cost on this machine's cores is carried over to a host of 8 and
of 16: one core is the engine's, and the others bring jobs, until the card is the bound.
"""

import argparse
import ctypes
import itertools
import json
import logging
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from benchmarks import results
from benchmarks.stand_ins import LOOK_S, STEP_S, model_info
from blipq_worker.inference import (
    Answer,
    EngineClient,
    EngineGone,
    EngineServer,
    Generate,
    Generated,
    GeneratedText,
    GenerationParams,
    ImagePixels,
    Item,
    Load,
    ModelInfo,
    Outcome,
    Priority,
    Reading,
    Recipe,
)

#: The most images of one look, and the tokens of a text.
MOST_LOOKED_AT, TOKENS = 32, 20
FRONTS, FRONT_MS = 2, 8.0
#: Whose jobs are carried over to whole hosts: those of ``python -m benchmarks host``.
CARRIED = "captured, 128 slots, 2 fronts, 640 x 480"
HOSTS = (8, 16)
WARM_S = 1.0
Mode = Literal["alone", "served", "at once"]
SAID = Generated(((GeneratedText("a photo of two cats on a couch", TOKENS),),))
INFO = model_info(
    dtype="float16", device="none", recipe=Recipe(224, 3, "1"), reading=Reading("", 2016)
)


class Job:
    """An item at work."""

    def __init__(self, done: Callable[[Outcome], None]) -> None:
        self.done, self.left, self.began = done, TOKENS, time.monotonic()

    def answer(self) -> None:
        """Says the same of any image."""
        self.done(Answer(SAID, (time.monotonic() - self.began) * 1000, 1.3, 1))


class Device:
    """Takes a device's time for slots of jobs that join and leave between steps; a ``Backend``."""

    def __init__(self, slots: int, mode: Mode) -> None:
        self._slots, self._mode = slots, mode
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._took: list[float] = []
        self.jobs = 0

    def models(self) -> Mapping[str, ModelInfo]:
        """One model, named ``default``."""
        return {"default": INFO}

    def submit(
        self,
        model: str,
        item: Item,
        priority: Priority,
        deadline: float | None,
        done: Callable[[Outcome], None],
        alone: bool = False,
        trace: str = "",
    ) -> Job:
        """Waits for a slot, unless this engine answers at once."""
        job = Job(done)
        if self._mode == "at once":
            self.jobs += 1
            job.answer()
        else:
            self._waiting.append(job)
        return job

    def cancel(self, handle: object) -> None:
        """Nothing: it ends soon."""

    def knows(
        self, model: str, digests: Sequence[str], features: Collection[str]
    ) -> Sequence[bool]:
        """It knows no image."""
        return [False] * len(digests)

    def forget(self, model: str, digests: Collection[str]) -> None:
        """Nothing: it knows no image."""

    def load(self) -> Load:
        """What there is to do."""
        return Load(len(self._waiting), len(self._running))

    def turn(self, server: EngineServer) -> None:
        """Jobs join, all take a step, and those that are done leave."""
        if self._mode == "alone":
            while len(self._waiting) < self._slots:
                self._waiting.append(Job(lambda outcome: None))
        if not self._waiting and not self._running:
            server.poll(0.1)
            return
        joined, started = self._join(server), time.monotonic()
        full = len(self._running) == self._slots
        _work(server, STEP_S[self._slots])
        ended = self._step()
        server.progress()
        if full and not joined and not ended:
            server.poll()
            self._took.append(time.monotonic() - started)

    def _join(self, server: EngineServer) -> int:
        free = self._slots - len(self._running)
        count = min(MOST_LOOKED_AT, free, len(self._waiting))
        if count < 16 and len(self._running) > free:
            return 0
        self._running += [self._waiting.popleft() for _ in range(count)]
        _work(server, LOOK_S * count)
        return count

    def _step(self) -> int:
        for job in self._running:
            job.left -= 1
        ended = [job for job in self._running if not job.left]
        self._running = [job for job in self._running if job.left]
        for job in ended:
            job.answer()
        self.jobs += len(ended)
        return len(ended)

    def found(self) -> dict[str, float]:
        """Milliseconds of a step: mean and 99th percentile."""
        took = sorted(self._took)
        if not took:
            return {}
        mean, p99 = statistics.fmean(took), took[int(len(took) * 0.99)]
        return {"step_ms": mean * 1000, "p99_ms": p99 * 1000, "steps": len(took)}


def _work(server: EngineServer, seconds: float) -> None:
    """The device works: fronts are served meanwhile, up to the last millisecond."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0.0015:
        server.poll(left - 0.0005)
    time.sleep(max(0.0, end - time.monotonic()))


def engine(path: Path, slots: int, mode: Mode) -> None:
    """Serves until SIGTERM; prints steps, jobs, and the share of a core."""
    ctypes.CDLL(None).prctl(29, 1, 0, 0, 0)  # PR_SET_TIMERSLACK: sleeps end within microseconds
    device = Device(slots, mode)
    server = EngineServer(path, device)
    ending = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ending.set())
    print("ready", flush=True)
    while device.jobs == 0 and not ending.is_set():
        device.turn(server)
    warm = time.monotonic() + WARM_S
    while time.monotonic() < warm:
        device.turn(server)
    jobs, cpu, began = device.jobs, time.thread_time(), time.monotonic()
    device._took.clear()
    while not ending.is_set():
        device.turn(server)
    span = time.monotonic() - began
    share = (time.thread_time() - cpu) / span
    print(json.dumps({"jobs_s": (device.jobs - jobs) / span, "share": share, **device.found()}))


def front(path: Path, work_ms: float) -> None:
    """Submits as fast as credits and its own work allow, until it is killed."""
    pictures = [memoryview(os.urandom(INFO.pixels_size)) for _ in range(16)]
    params = GenerationParams(max_new_tokens=TOKENS, num_beams=1)
    logging.disable()  # the engine ends first
    client = EngineClient(path)
    for picture in itertools.cycle(pictures):
        ends = time.thread_time() + work_ms / 1000
        while time.thread_time() < ends:
            sorted(range(500), key=lambda each: -each)
        image = ImagePixels("a" * 64, False, (picture,))
        item = Generate(image, ("a photo of",), params)
        try:
            client.submit("default", item, "normal", time.monotonic() + 600)
        except EngineGone:
            return


def _measured(slots: int, mode: Mode, seconds: float, fronts: int, work_ms: float) -> Any:
    """What the engine prints after so many seconds with these fronts."""
    with tempfile.TemporaryDirectory(prefix="bq") as folder:
        path = str(Path(folder) / "engine")
        own = [sys.executable, "-m", "benchmarks.split"]
        engine = subprocess.Popen(
            [*own, "engine", path, str(slots), mode], stdout=subprocess.PIPE, text=True
        )
        assert engine.stdout is not None
        engine.stdout.readline()
        command = [*own, "front", path, str(work_ms)]
        processes = [subprocess.Popen(command) for _ in range(fronts)]
        time.sleep(WARM_S + 1)
        began = sum(_cpu_s(process.pid) for process in processes)
        time.sleep(seconds)
        took = sum(_cpu_s(process.pid) for process in processes) - began
        engine.terminate()
        found = json.loads(engine.communicate(timeout=30)[0])
        found["fronts_share"] = took / seconds
        for process in processes:
            process.kill()
            process.wait()
        return found


def _cpu_s(pid: int) -> float:
    """CPU time of a process until now."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def split(seconds: float) -> dict[str, Any]:
    """By slots: steps alone and beside fronts, the engine's share of a core, and jobs a second."""
    found = {}
    for slots in STEP_S:
        alone = _measured(slots, "alone", seconds, 0, 0)
        served = _measured(slots, "served", seconds, FRONTS, 0)
        bound = _measured(slots, "served", seconds, 1, FRONT_MS)
        at_once = _measured(slots, "at once", seconds, 1, FRONT_MS)
        found[f"{slots} slots"] = {
            "alone": alone,
            "served": served,
            "grows": served["step_ms"] / alone["step_ms"] - 1,
            "bound by a front": bound,
            "answered at once": at_once,
            "ratio": bound["jobs_s"] / at_once["jobs_s"],
        }
    return found


def host(cores: int, alone: Mapping[str, float], at_once: Mapping[str, float]) -> dict[str, float]:
    """Jobs a second on a host: what the card does, and what fronts on all other cores bring."""
    socket_ms = max(0.0, 1000 * at_once["fronts_share"] / at_once["jobs_s"] - FRONT_MS)
    fronts = (cores - 1) * 1000 / (job_ms() + socket_ms)
    return {"card": alone["jobs_s"], "fronts": fronts, "jobs_s": min(alone["jobs_s"], fronts)}


def job_ms() -> float:
    """Milliseconds of a core that a job of 640 x 480 pixels takes beside the model's thread."""
    kept = results.load("host")
    if kept is None:
        raise SystemExit("python -m benchmarks host comes first")
    of = kept["found"][CARRIED]
    return float(of["cpu_ms_a_job"]["worker"] - of["worker_ms_by_part"]["the model's thread"])


def _bound(host: Mapping[str, float]) -> str:
    by = "card" if host["card"] <= host["fronts"] else "fronts"
    return f"{host['jobs_s']:.0f} ({by})"


def rows(found: Mapping[str, Any]) -> list[list[str]]:
    """A line of the table for each number of slots."""
    return [
        [
            name,
            f"{each['alone']['step_ms']:.2f} / {each['alone']['p99_ms']:.2f}",
            f"{each['served']['step_ms']:.2f} / {each['served']['p99_ms']:.2f}",
            f"{each['grows']:+.1%}",
            f"{each['served']['jobs_s']:.0f} of {each['alone']['jobs_s']:.0f}",
            f"{each['alone']['share']:.2f} / {each['served']['share']:.2f}",
            f"{each['bound by a front']['jobs_s']:.0f} of {each['answered at once']['jobs_s']:.0f}",
            f"{each['ratio']:.2f}",
            *(_bound(host(cores, each["alone"], each["answered at once"])) for cores in HOSTS),
        ]
        for name, each in found.items()
    ]


HEAD = ["device", "step alone, ms mean / p99", "beside fronts", "grows", "jobs/s of alone"]
HEAD += ["share of a core alone / served", f"fronts of {FRONT_MS:g} ms: of at once", "ratio"]
HEAD += [f"jobs/s on {cores} cores (bound)" for cores in HOSTS]


def main() -> None:
    """Measures and prints the table; or is the engine or a front of a measurement."""
    parser = argparse.ArgumentParser("python -m benchmarks.split", description=__doc__)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each measurement")
    parser.add_argument("part", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    match options.part:
        case ["engine", path, slots, mode]:
            engine(Path(path), int(slots), mode)
        case ["front", path, work_ms]:
            front(Path(path), float(work_ms))
        case _:
            found = split(options.seconds)
            for line in (HEAD, *rows(found)):
                print(" | ".join(line))
            print(f"load average {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
