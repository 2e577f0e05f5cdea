"""The whole service on one card: Redis, stand-ins for S3, one worker, and a client with a backlog.

The worker is started and asked as its users do, so nothing here depends on how it works inside.
"""

import http.client
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import redis

from benchmarks.clients import finish_all
from benchmarks.processes import of_worker
from blipq import CaptionRequest, Client, Job, JobInfo, ResultTimeout, Settings
from blipq.contract import Generation, ImageRef, Status
from blipq.local.stack import free_ports, redis_command
from blipq.local.supervisor import Service

ROOT = Path(__file__).parents[2]
TOKENS = 20
GREEDY = Generation(num_beams=1, max_new_tokens=TOKENS, min_new_tokens=TOKENS)
#: A default job has five beams.
BEAMS = Generation(max_new_tokens=TOKENS, min_new_tokens=TOKENS)
STUBS = 4
START_TIMEOUT_S = 150.0
#: The share of the jobs that ended first, which is not counted: the worker is filling up.
WARMING = 0.1


@dataclass(frozen=True)
class Work:
    """A backlog of captions that lasts for ``seconds``."""

    generation: Generation
    size: str
    seconds: float


WORK = {
    "greedy": Work(GREEDY, "coco", 25),
    "default": Work(BEAMS, "coco", 18),
    "12 MP": Work(GREEDY, "12mp", 12),
}
#: Jobs that warm the worker up, and show how many a backlog needs: more than it can do in its time.
WARM, MORE = 128, 3


class Servers:
    """A Redis-protocol server and stand-ins for S3, on ports of their own."""

    def __init__(self, folder: Path, sizes: Sequence[str], stubs: int = STUBS) -> None:
        redis_port, self.s3_port = free_ports(2)
        self._redis = [redis_command(), "--port", str(redis_port), "--dir", str(folder)]
        self._redis += ["--save", "", "--appendonly", "yes", "--maxmemory-policy", "noeviction"]
        stub = [sys.executable, "-m", "benchmarks.gpu.stub_s3", str(self.s3_port), str(stubs)]
        self.services = [
            Service("redis", self._redis, log=folder / "redis.log"),
            Service("s3", [*stub, *sizes], env=_python_path(), log=folder / "s3.log"),
        ]
        self.environment = {
            "BLIPQ_REDIS_URL": f"redis://127.0.0.1:{redis_port}/0",
            "BLIPQ_S3_ENDPOINT_URL": f"http://127.0.0.1:{self.s3_port}",
            "BLIPQ_S3_ACCESS_KEY_ID": "stub",
            "BLIPQ_S3_SECRET_ACCESS_KEY": "stub",
            "BLIPQ_S3_REGION": "us-east-1",
        }

    def start(self) -> None:
        """Starts them and waits until they answer."""
        for service in self.services:
            service.start()
        _until(self._answer, "the servers do not answer", timeout_s=60)

    def _answer(self) -> bool:
        with suppress(OSError, redis.RedisError):
            url = self.environment["BLIPQ_REDIS_URL"]
            get(self.s3_port, "coco/0.jpg")
            with redis.Redis.from_url(url) as server:
                return bool(server.ping())
        return False

    def stop(self) -> None:
        """Stops them, and what they have forked."""
        for service in self.services:
            _end(service)


@dataclass
class Bench:
    """Servers, one worker and a client. command: what stands in for ``blipq worker``."""

    folder: Path
    environment: Mapping[str, str]
    command: Sequence[str] = (sys.executable, "-m", "blipq_worker")
    work: Mapping[str, Work] = field(default_factory=lambda: WORK)
    warm: int = WARM

    def __post_init__(self) -> None:
        sizes = sorted({each.size for each in self.work.values()})
        self.servers = Servers(self.folder, sizes)
        self._numbers = count()

    @contextmanager
    def running(self) -> Iterator["Bench"]:
        """The servers run, and a client."""
        with ExitStack() as stack:
            self.servers.start()
            stack.callback(self.servers.stop)
            named = self.servers.environment.items()
            settings = {name.removeprefix("BLIPQ_").lower(): value for name, value in named}
            self.settings = Settings.model_validate(settings)
            self.client = stack.enter_context(Client(self.settings))
            yield self

    def start_worker(self) -> dict[str, Any]:
        """Starts the worker; seconds to its first answer, and when each line of its log came.

        And how many fronts it has: 0 where it is one process.
        """
        self.log = self.folder / "worker.log"
        env = {**_python_path(), **self.servers.environment, **self.environment}
        self.worker = Service("worker", self.command, env=env, log=self.log)
        started, began = time.monotonic(), datetime.now()
        self.worker.start()
        (job,) = self.client.submit_many(self.requests(1, GREEDY))
        deadline = started + START_TIMEOUT_S
        while True:
            with suppress(ResultTimeout):
                job.result(timeout=1)
                break
            if self.worker.exit_code is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the worker does not serve: {self.worker.last_words()}")
        took = time.monotonic() - started
        fronts = len(of_worker(self.worker.pid).get("front", []))
        return {"first_answer_s": took, "fronts": fronts, "log_s": _log_times(self.log, began)}

    def stop_worker(self) -> None:
        """Ends the worker with its children."""
        _end(self.worker)

    def requests(
        self, jobs: int, generation: Generation, size: str = "coco"
    ) -> list[CaptionRequest]:
        """Requests for captions of pictures that nobody has asked about."""
        names = (f"{size}/{next(self._numbers)}.jpg" for _ in range(jobs))
        return [
            CaptionRequest(image=ImageRef(uri=f"s3://pictures/{name}"), generation=generation)
            for name in names
        ]

    def backlog(self, name: str) -> dict[str, Any]:
        """Jobs a second while a backlog lasts, and milliseconds of CPU a job by process.

        What is left of it in the end is cancelled.
        """
        work = self.work[name]
        warm = self.requests(self.warm, work.generation, work.size)
        started = time.monotonic()
        self._ended(self.client.submit_many(warm), START_TIMEOUT_S)
        per_s = self.warm / (time.monotonic() - started)
        count = round(MORE * per_s * work.seconds) + self.warm
        jobs = self.client.submit_many(self.requests(count, work.generation, work.size))
        before, started = self._cpu(), time.monotonic()
        ended = self._ended(jobs, work.seconds)
        seconds, after = time.monotonic() - started, self._cpu()
        known = {info.id for info in ended}
        for job in jobs:
            if job.id not in known:
                job.cancel()
        spent = {part: after[part] - before[part] for part in before}
        return {
            **_honest(ended),
            "per_s": _steady(ended),
            "seconds": seconds,
            "lasted": len(ended) < len(jobs),
            "cpu_ms_a_job": {part: 1000 * each / len(ended) for part, each in spent.items()},
            "cores_busy": sum(spent.values()) / seconds,
            "stages_ms": _stages(ended),
        }

    def _ended(self, jobs: Sequence[Job[Any]], timeout_s: float) -> list[JobInfo]:
        """What became of those jobs that ended in this time."""
        ended: list[JobInfo] = []
        with suppress(ResultTimeout):
            for job in self.client.as_completed(jobs, timeout=timeout_s):
                ended.append(job.info())  # the time may be over in the middle
        return ended

    def alone(self) -> dict[str, float]:
        """Milliseconds from a call to its answer, one job at a time: median and longest of ten."""
        waits = []
        for request in self.requests(10, GREEDY):
            started = time.monotonic()
            self.client.submit(request).result(timeout=60)
            waits.append(1000 * (time.monotonic() - started))
            time.sleep(0.05)
        return {"p50_ms": sorted(waits)[len(waits) // 2], "longest_ms": max(waits)}

    def stubs_alone(self, seconds: float) -> dict[str, float]:
        """Pictures a second that the stand-ins for S3 give away, read by as many processes."""
        with ProcessPoolExecutor(STUBS, mp_context=get_context("spawn")) as pool:
            ports = [self.servers.s3_port] * STUBS
            return {"per_s": sum(pool.map(_read_for, ports, [seconds] * STUBS))}

    def client_alone(self, jobs: int) -> dict[str, float]:
        """Jobs a second of this client and Redis, where processes record outcomes at once."""
        started = time.monotonic()
        submitted = self.client.submit_many(self.requests(jobs, GREEDY))
        submit_s = time.monotonic() - started
        ids = [job.id for job in submitted]
        shares = [ids[number::STUBS] for number in range(STUBS)]
        with ProcessPoolExecutor(STUBS, mp_context=get_context("spawn")) as pool:
            ending = pool.map(finish_all, [self.settings] * STUBS, shares)
            ended = [job.info() for job in self.client.as_completed(submitted, timeout=60)]
            list(ending)
        return {"submit_per_s": jobs / submit_s, "per_s": _steady(ended)}

    def _cpu(self) -> dict[str, float]:
        """CPU seconds of each process with its children, and of this one."""
        parts = {each.name: each.pid for each in (self.worker, *self.servers.services)}
        return {name: _cpu_s(pid) for name, pid in parts.items()} | {"client": time.process_time()}


def get(port: int, key: str) -> int:
    """Reads a picture from a stand-in for S3; its length."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", f"/pictures/{key}")
        return len(connection.getresponse().read())
    finally:
        connection.close()


def _read_for(port: int, seconds: float) -> float:
    """Pictures a second over one kept connection."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    started, read = time.monotonic(), 0
    while time.monotonic() - started < seconds:
        connection.request("GET", f"/pictures/coco/{read}.jpg")
        connection.getresponse().read()
        read += 1
    connection.close()
    return read / (time.monotonic() - started)


def _honest(ended: Sequence[JobInfo]) -> dict[str, Any]:
    """How many ended, and what would make their rate worth less; raises if any of it is there."""
    receipts = [info.receipt for info in ended if info.receipt is not None]
    found = {
        "jobs": len(ended),
        "failed": sum(info.status is not Status.SUCCEEDED for info in ended),
        "cache_hits": sum(bool(each.cache_hit) for each in receipts),
        "shared": sum(bool(each.shared) for each in receipts),
        "not_20_tokens": sum(each.tokens != TOKENS for each in receipts),
    }
    if len(ended) < 2 or any(found[name] for name in found if name != "jobs"):
        errors = [str(info.error) for info in ended if info.error][:2]
        raise RuntimeError(f"this is no fair run: {found}, {errors}")
    return found


def _steady(ended: Sequence[JobInfo]) -> float:
    """Jobs a second from the end of the first tenth to that of the last one."""
    times = sorted(info.completed_at.timestamp() for info in ended if info.completed_at)
    first = times[int(WARMING * len(times))]
    return sum(each > first for each in times) / (times[-1] - first)


def _stages(ended: Sequence[JobInfo]) -> dict[str, float]:
    """Medians of the receipts' milliseconds."""
    receipts = [info.receipt.model_dump(exclude_none=True) for info in ended if info.receipt]
    names = {name for each in receipts for name in each if name.endswith("_ms")}
    values = {name: sorted(each.get(name, 0.0) for each in receipts) for name in sorted(names)}
    return {name: each[len(each) // 2] for name, each in values.items()}


def _log_times(log: Path, began: datetime) -> dict[str, float]:
    """Seconds from the start to each line of a worker's log, by the line's beginning."""
    found = {}
    for line in log.read_text(errors="replace").splitlines():
        stamp, text = line[:23], line[24:]
        with suppress(ValueError):
            at = datetime.strptime(stamp, "%Y-%m-%d %H:%M:%S,%f")
            found[text[:60]] = round((at - began).total_seconds(), 1)
    return found


def _cpu_s(pid: int | None) -> float:
    """CPU seconds of a process and its descendants; 0 of one that has ended."""
    total = 0.0
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for each in (process, *process.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                times = each.cpu_times()
                total += times.user + times.system
    return total


def _end(service: Service) -> None:
    """Stops a process with its descendants."""
    with suppress(psutil.NoSuchProcess, TypeError):
        children = psutil.Process(service.pid).children(recursive=True) if service.pid else []
        service.stop(timeout=15)
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.kill()


def _python_path() -> dict[str, str]:
    """So that a child finds this folder, wherever it starts."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths)}


def _until(true: Callable[[], bool], otherwise: str, *, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        if time.monotonic() > deadline:
            raise RuntimeError(otherwise)
        time.sleep(0.1)
