"""A rig for breaking things: a stack of its own, and worker processes to kill, freeze and drain."""

import functools
import io
import itertools
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import amqp
import pytest
from PIL import Image

from blipq import Client, Job, JobInfo, Status, cli
from blipq.errors import BlipqError
from blipq.ledger import keys
from blipq.ledger.connection import redis_errors
from blipq.ledger.operator import OperatorLedger
from blipq.local.stack import LocalStack, worker_service
from blipq.local.supervisor import Service
from conftest import wait_until
from guarantees.cells.servers import Server
from guarantees.fronts import parts
from guarantees.stand_ins import faulty_worker
from guarantees.stand_ins.faulty_s3 import FaultyS3
from guarantees.stand_ins.forked import Forked
from stacks import BROKER, SqsStack, local_stack

#: Leases are scaled down, so that a crash costs seconds. The real settings run on demand.
LEASE_S = float(os.environ.get("GUARANTEES_LEASE_S", "3"))

_FRONTS = os.environ.get("GUARANTEES_FRONTS")
#: For tests about the lives of workers: in one process, and with fronts.
both_forms = pytest.mark.parametrize(
    "fronts", [0, 2] if _FRONTS is None else [int(_FRONTS)], ids=lambda fronts: f"{fronts} fronts"
)


class Rig:
    """A stack, a client and workers, ``forked`` or started from nothing as in production.

    fronts: of each worker with the faulty model. stack: not started; by default the run's kind.
    """

    def __init__(
        self,
        folder: Path,
        *,
        forked: bool = True,
        fronts: int = 0,
        stack: LocalStack | None = None,
    ) -> None:
        self.folder = folder
        self._forked = forked
        self._fronts = fronts
        self.stack = stack or local_stack(folder / "stack")
        self.stack.start()
        self.settings = self.stack.settings()
        self.client = Client(self.settings)
        self.operator = OperatorLedger.beside(self.client.ledger)
        self.image = self.client.storage.upload(png())
        self.s3 = FaultyS3(str(self.settings.s3_endpoint_url))
        self.workers: list[Service] = []
        self.stops = folder / "stops"
        self._numbers = itertools.count()

    # -- workers --

    def start_worker(self, **options: Any) -> Service:
        """Starts a worker and waits until it serves."""
        worker = self.launch_worker(**options)
        if self._fronts:
            self.wait_for_fronts(worker)
        return self._ready(self._serving(worker))

    def start_demo_worker(self, **options: Any) -> Service:
        """A worker with the demo model, as in production."""
        environment = self.stack.environment() | {"BLIPQ_MODELS": "default=demo"} | named(options)
        log = self.folder / f"worker-{next(self._numbers)}.log"
        return self._ready(self.serve(worker_service(environment, log)))

    def serve(self, worker: Service) -> Service:
        """Starts any worker process, and waits until it serves."""
        worker.start()
        self.workers.append(worker)
        return self._serving(worker)

    def wait_for_fronts(self, worker: Service) -> None:
        """Waits until all fronts of a worker take jobs."""

        def all_serve() -> bool:
            assert worker.exit_code is None, worker.last_words(40)
            return len(parts.serving(worker)) == self._fronts

        wait_until(all_serve, "fronts that take jobs", timeout=120)

    def _ready(self, worker: Service) -> Service:
        """Waits for its queues and its ear for revokes: it is registered some time before."""
        wait_until(lambda: "ready after" in worker.last_words(1000), "a worker that is ready", 60)
        return worker

    def _serving(self, worker: Service) -> Service:
        name = f"-{worker.pid}-"
        wait_until(lambda: self._alive(worker, name), "the worker", timeout=60)
        return worker

    def launch_worker(
        self, *, contract: int | None = None, device: str | None = None, **options: Any
    ) -> Service:
        """Starts a worker without waiting.

        contract: as if it were of another version. device: what is wrong with it (FaultyModel).
        """
        own = {"lease_s": LEASE_S, "drain_timeout_s": 10, "retry_backoff_s": 0.1}
        options = own | {"fronts": self._fronts} | options
        environment = self.stack.environment() | {"OMP_NUM_THREADS": "1"}
        environment["BLIPQ_S3_ENDPOINT_URL"] = self.s3.url
        environment["FAULTY_STOPS"] = str(self.stops)
        environment |= named(options)
        if contract is not None:
            environment["FAULTY_CONTRACT"] = str(contract)
        if device is not None:
            environment["FAULTY_DEVICE"] = device
        log = self.folder / f"worker-{next(self._numbers)}.log"
        worker = self._worker(environment, log)
        worker.start()
        self.workers.append(worker)
        return worker

    def _worker(self, environment: dict[str, str], log: Path) -> Service:
        if self._forked:
            return Forked("worker", faulty_worker.main, env=environment, log=log)
        command = [sys.executable, faulty_worker.__file__]
        return Service("worker", command, env=environment, log=log)

    def command(self, *arguments: str) -> Service:
        """The ``blipq`` command, not started."""
        environment = self.stack.environment()
        log = self.folder / f"{arguments[0]}.log"
        if self._forked:
            main = functools.partial(run_command, arguments)
            return Forked(arguments[0], main, env=environment, log=log)
        command = [sys.executable, "-m", "blipq", *arguments]
        return Service(arguments[0], command, env=environment, log=log)

    def _alive(self, worker: Service, name: str) -> bool:
        assert worker.exit_code is None, worker.last_words(40)
        with suppress(BlipqError), redis_errors():
            # One of an earlier version is in the list of its model alone.
            serving = self.redis(lambda raw: raw.zrange(keys.serving("default"), 0, -1))
            return any(name in known for known in {*self.operator.workers(), *serving})
        return False

    def wait_for_death(self, worker: Service, timeout: float = 60.0) -> None:
        wait_until(lambda: worker.exit_code is not None, "the worker's death", timeout)

    def kill(self, worker: Service) -> None:
        """kill -9."""
        worker.signal(signal.SIGKILL)
        self.wait_for_death(worker)

    # -- jobs --

    def submit(self, prompt: str, **options: Any) -> Job[Any]:
        """A job whose prompt says what its worker does with it."""
        return self.client.caption(self.image, prompt, **options)

    def submit_all(self, prompts: Sequence[str], **options: Any) -> list[Job[Any]]:
        return [self.submit(prompt, **options) for prompt in prompts]

    def put(self, queue: str, body: bytes) -> None:
        """A message that no Celery client would send."""
        if isinstance(self.stack, SqsStack):
            self.stack.put(queue, body)
            return
        if BROKER == "redis":
            self.redis(lambda raw: raw.lpush(queue, body))
            return
        with self.client.broker.app.connection_for_write() as connection:
            connection.default_channel.basic_publish(amqp.Message(body), routing_key=queue)

    def send(self, headers: Any, body: str, queue: str = "blipq.default.normal") -> None:
        """A message with any headers and body, as a Celery client of some other make sends it."""
        with self.client.broker.app.producer_pool.acquire() as producer:
            producer.publish(
                body,
                headers=headers,
                content_type="application/json",
                content_encoding="utf-8",
                routing_key=queue,
                # RabbitMQ drops what is sent to a queue that no worker has declared yet.
                declare=[self.client.broker.app.amqp.queues[queue]],
            )

    def running(self) -> int:
        """How many jobs are under a lease."""
        return int(self.redis(lambda raw: raw.zcard("blipq:running")))

    def has_at_most(self, open: int) -> bool:
        """Whether no more than so many jobs are open."""
        return int(self.redis(lambda raw: raw.zcard("blipq:open"))) <= open

    def redis(self, do: Callable[[Any], Any]) -> Any:
        return self.servers[0].redis(do)

    def outcomes(self, jobs: Sequence[Job[Any]], timeout: float = 60.0) -> list[JobInfo]:
        """Waits for all jobs to end."""
        deadline = time.monotonic() + timeout
        return [job.wait(max(0.1, deadline - time.monotonic())) for job in jobs]

    def all_succeed(self, jobs: Sequence[Job[Any]], timeout: float = 60.0) -> None:
        infos = self.outcomes(jobs, timeout)
        assert {info.status for info in infos} == {Status.SUCCEEDED}, [
            info for info in infos if info.status is not Status.SUCCEEDED
        ][:3]

    def upload(self, fault: str, data: bytes | None = None) -> str:
        """A picture whose download meets a fault (see FaultyS3)."""
        uri = f"s3://{self.settings.inbox_bucket}/fault={fault}/{next(self._numbers)}.png"
        self.client.storage.put(uri, png() if data is None else data, content_type="image/png")
        return uri

    # -- Redis --

    @property
    def servers(self) -> list[Server]:
        """The Redis servers."""
        return [Server(self.stack.services[0], self.settings)]

    def keys_without_ttl(self) -> list[str]:
        """Our keys that would live for ever."""
        return [key for server in self.servers for key in server.keys_without_ttl()]

    def kill_redis(self) -> None:
        """kill -9 of the Redis server."""
        self.servers[0].kill()

    def start_redis(self) -> None:
        """Starts the Redis server again on its data."""
        self.servers[0].start()

    def redis_answers(self) -> bool:
        return self.servers[0].answers()

    def close(self) -> None:
        for worker in self.workers:
            for each in [*parts.processes(worker, "front"), *parts.processes(worker, "engine")]:
                each.resume()
                each.kill()
            worker.signal(signal.SIGCONT)
            worker.signal(signal.SIGKILL)
        for worker in self.workers:
            worker.stop()
        for service in self.stack.services:
            service.signal(signal.SIGCONT)
        self.client.close()
        self.s3.close()
        self.stack.stop()


def named(options: Mapping[str, Any]) -> dict[str, str]:
    """Settings as environment variables."""
    return {f"BLIPQ_{key.upper()}": str(value) for key, value in options.items()}


def run_command(arguments: Sequence[str]) -> int:
    """What ``python -m blipq`` does."""
    sys.argv = ["blipq", *arguments]
    cli.main()
    return 0


def png(color: str = "red", size: tuple[int, int] = (32, 32)) -> bytes:
    """A small picture."""
    stream = io.BytesIO()
    Image.new("RGB", size, color).save(stream, "PNG")
    return stream.getvalue()
