"""The whole service for a benchmark: servers and a worker on this machine, and jobs through it."""

import random
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from blipq import Client, Job, JobInfo
from blipq.contract import ImageRef, Options, Request, Status
from blipq.errors import BlipqError
from blipq.ledger.operator import OperatorLedger
from blipq.local.stack import LocalStack, worker_service
from blipq.local.supervisor import Service
from blipq_worker.bench import cpu
from blipq_worker.bench.rate import steady_per_s
from blipq_worker.process.fleet import shares_of_cores

START_TIMEOUT_S = 300.0
RUN_TIMEOUT_S = 900.0


class BenchError(BlipqError):
    """The benchmark cannot go on; the message has the reason."""


@dataclass(frozen=True)
class Through:
    """What came of jobs. Latencies are from submit to outcome, in seconds."""

    jobs: int
    seconds: float
    latencies: Sequence[float]
    infos: Sequence[JobInfo]
    cpu_s: Mapping[str, float]

    @property
    def per_s(self) -> float:
        """Jobs a second, from the first submit to the last outcome."""
        return self.jobs / self.seconds

    def cpu_ms(self) -> dict[str, float]:
        """Milliseconds of CPU that a job took, by who took it; see ``Meter``."""
        return {name: 1000 * spent / self.jobs for name, spent in self.cpu_s.items()}

    @property
    def cores_busy(self) -> float:
        """Cores that workers, servers and client kept busy, on average."""
        return sum(self.cpu_s.values()) / self.seconds

    def steady_per_s(self, held: int) -> float:
        """Jobs a second without the first and the last ``held``: while the backlog was full."""
        ended = [each.completed_at.timestamp() for each in self.infos if each.completed_at]
        return steady_per_s(ended, held)

    def percentile(self, share: float) -> float:
        """A latency that so many of the jobs stay under."""
        ordered = sorted(self.latencies)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    def stages(self) -> dict[str, float]:
        """Medians of the receipts' milliseconds."""
        found = [info.receipt for info in self.infos if info.receipt is not None]
        receipts = [receipt.model_dump(exclude_none=True) for receipt in found]
        names = {name for receipt in receipts for name in receipt if name.endswith("_ms")}
        times = {name: sorted(each.get(name, 0.0) for each in receipts) for name in sorted(names)}
        return {name: values[len(values) // 2] for name, values in times.items()}


class Meter:
    """Reads CPU seconds: the workers' models and other threads, the servers and this process."""

    def __init__(self, workers: Sequence[Service], servers: Sequence[Service]) -> None:
        self._workers = [each.pid for each in workers]
        self._threads = [cpu.model_threads(each.env) for each in workers]
        self._servers = {each.name: each.pid for each in servers}
        self._before = self._read()

    def _read(self) -> tuple[list[cpu.Used], dict[str, float]]:
        servers = {name: cpu.used(pid).total for name, pid in self._servers.items()}
        return [cpu.used(pid) for pid in self._workers], servers | {"client": time.process_time()}

    def read(self) -> dict[str, float]:
        """Seconds since the meter was made; workers are added up."""
        workers, rest = self._read()
        parts = [
            now.since(then, threads)
            for now, then, threads in zip(workers, self._before[0], self._threads, strict=True)
        ]
        found = {name: sum(part[name] for part in parts) for name in ("model", "others")}
        return found | {name: spent - self._before[1][name] for name, spent in rest.items()}


class Stack:
    """Redis, S3, a client, and workers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.local = LocalStack(folder / "stack")
        self.local.start()
        self.client = Client(self.local.settings())
        self.workers: list[Service] = []

    def start_workers(
        self,
        environment: Mapping[str, str],
        program: Sequence[str] | None = None,
        *,
        processes: int = 1,
    ) -> None:
        """Starts workers that share the cores, or what stands in for them, and waits for them."""
        operator = OperatorLedger.beside(self.client.ledger)
        before = set(operator.workers())
        for _ in range(processes):
            worker = worker_service(
                {**shares_of_cores(processes), **self.local.environment(), **environment},
                self.folder / f"worker-{len(self.workers)}.log",
            )
            if program:
                worker.command = list(program)
            worker.start()
            self.workers.append(worker)
        deadline = time.monotonic() + START_TIMEOUT_S
        while len(set(operator.workers()) - before) < processes:
            for worker in self.workers:
                if worker.exit_code is not None or time.monotonic() > deadline:
                    raise BenchError(f"the worker does not serve:\n{worker.last_words()}")
            time.sleep(0.05)

    def stop_workers(self) -> None:
        """Stops them all, side by side."""
        for worker in self.workers:
            worker.signal(signal.SIGTERM)
        for worker in self.workers:
            worker.stop(timeout=30)
        self.workers.clear()

    def upload(self, pictures: Sequence[bytes]) -> list[ImageRef]:
        """Puts pictures into the inbox."""
        return [self.client.storage.upload(each) for each in pictures]

    def backlog(self, requests: Sequence[Request], model: str = "default") -> Through:
        """All jobs at once."""
        started, meter = time.monotonic(), self._meter()
        jobs = self.client.submit_many(requests, Options(model=model))
        return self.ended(jobs, started, meter)

    def arriving(
        self, requests: Sequence[Request], per_s: float, model: str = "default", seed: int = 1
    ) -> Through:
        """Jobs at random moments, ``per_s`` on average, whatever has ended by then."""
        draw, meter = random.Random(seed), self._meter()
        started = due = time.monotonic()
        jobs = []
        for request in requests:
            due += draw.expovariate(per_s)
            time.sleep(max(0.0, due - time.monotonic()))
            jobs.append(self.client.submit(request, Options(model=model)))
        return self.ended(jobs, started, meter)

    def _meter(self) -> Meter:
        return Meter(self.workers, self.local.services)

    def ended(self, jobs: Sequence["Job[Any]"], started: float, meter: Meter) -> Through:
        """Waits for jobs that were submitted since ``started``."""
        ended = self.client.wait_all(jobs, timeout=RUN_TIMEOUT_S)
        seconds, spent = time.monotonic() - started, meter.read()
        infos = [job.info() for job in ended]
        return Through(len(jobs), seconds, [_latency(info) for info in infos], infos, spent)

    def close(self) -> None:
        """Stops the workers, the client, Redis and S3."""
        self.stop_workers()
        self.client.close()
        self.local.stop()


def _latency(info: JobInfo) -> float:
    """Seconds from submit to success."""
    if info.status is not Status.SUCCEEDED or info.completed_at is None:
        raise BenchError(f"{info.id} {info.status}: {info.error}")
    return (info.completed_at - info.created_at).total_seconds()


@contextmanager
def running() -> Iterator[Stack]:
    """A stack in a folder that goes away with it."""
    with TemporaryDirectory(prefix="blipq-bench-") as folder:
        stack = Stack(Path(folder))
        try:
            yield stack
        finally:
            stack.close()
