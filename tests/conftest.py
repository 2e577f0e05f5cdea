"""The real local stack, once per test run: a Redis-protocol server, an S3 server and a worker."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from blipq import Client, Settings
from blipq.ledger.connection import connect
from blipq.ledger.worker import WorkerLedger
from blipq.local.stack import LocalStack
from blipq.local.supervisor import Service
from stacks import local_stack

#: Jobs of tests may wait for these models, which no worker serves.
KNOWN_MODELS = ("nobody", "other", "forgotten", "m", "demo")

ROOT = Path(__file__).parent.parent

# Before anything imports Triton: its kernels run on a CPU then.
os.environ["TRITON_INTERPRET"] = "1"

# Before anything imports torch, here and in the processes that tests start: tests share the cores,
# and a tiny model's threads would spend their time waiting for each other.
os.environ["OMP_NUM_THREADS"] = "1"

# Settings of the person who runs the tests must not reach them.
for name in [name for name in os.environ if name.startswith(("BLIPQ_", "AWS_"))]:
    del os.environ[name]
# A file that is not there. Never a device: `blipq up` replaces the file, and removes it at its end.
os.environ["BLIPQ_STACK_FILE"] = f"{tempfile.gettempdir()}/blipq-no-stack-{os.getpid()}.json"

# Where the run itself is a shell's background job, its programs would ignore interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def httpserver_listen_address() -> tuple[str, int]:
    """An address, not a name that may mean another one too; one server for the whole run."""
    return "127.0.0.1", 0


def wait_until(condition: Callable[[], object], what: str, timeout: float = 30.0) -> None:
    """Polls until the condition holds; fails saying what was waited for."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout:g} s for {what}"
        time.sleep(0.02)


def live_workers(settings: Settings, model: str = "default") -> int:
    """How many workers say that they serve a model."""
    with connect(settings) as client:
        return int(client.zcount(f"blipq:serving:{model}", time.time() * 1000, "+inf"))


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    """Redis and S3 on free ports, in a folder that goes away."""
    stack = local_stack(tmp_path_factory.mktemp("stack"))
    stack.start()
    yield stack
    stack.stop()


@pytest.fixture(scope="session")
def settings(stack: LocalStack) -> Settings:
    return stack.settings().model_copy(update={"known_models": KNOWN_MODELS})


@pytest.fixture
def client(settings: Settings) -> Iterator[Client]:
    with Client(settings) as client:
        yield client


@pytest.fixture
def raw_redis(settings: Settings) -> Iterator["redis.Redis"]:
    """A plain Redis client."""
    with connect(settings) as raw:
        yield raw


@pytest.fixture
def ledger(raw_redis: "redis.Redis", settings: Settings) -> WorkerLedger:
    return WorkerLedger(raw_redis, settings)


def ledger_of(client: Client) -> WorkerLedger:
    """The worker's side of a client's ledger."""
    return WorkerLedger.beside(client.ledger)


@pytest.fixture
def apart(stack: LocalStack) -> Iterator[Settings]:
    """The same services, but a Redis database that is empty and that no worker looks at."""
    fields = stack.settings_fields()
    fields["redis_url"] = fields["redis_url"].removesuffix("/0") + "/1"
    settings = Settings.model_validate(fields | {"known_models": KNOWN_MODELS})
    with connect(settings) as raw:
        raw.flushdb()
        yield settings
        forever = [key for key in raw.scan_iter("blipq:*") if raw.ttl(key) == -1]
    assert not forever, f"keys without a time to live: {forever}"


def start_worker(stack: LocalStack, log: Path, **options: str) -> Service:
    """A worker process of the stack, as `blipq worker` starts it; options are BLIPQ_* settings."""
    environment = stack.environment() | {"OMP_NUM_THREADS": "1"}
    environment |= {f"BLIPQ_{name.upper()}": value for name, value in options.items()}
    service = Service("worker", [sys.executable, "-m", "blipq_worker"], env=environment, log=log)
    service.start()
    return service


def wait_for_worker(service: Service, settings: Settings, model: str = "default") -> None:
    """Until the worker serves the model; shows its log if it dies."""

    def served() -> bool:
        assert service.exit_code is None, service.last_words(40)
        return live_workers(settings, model) > 0

    wait_until(served, "the worker", timeout=90)


@pytest.fixture(scope="session")
def worker(
    stack: LocalStack, settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    """A real worker with the demo model in fp32, for the whole run."""
    log = tmp_path_factory.mktemp("worker") / "worker.log"
    service = start_worker(stack, log, dtype="float32", image_allow="127.0.0.1")
    try:
        wait_for_worker(service, settings)
        yield service
    finally:
        service.stop(timeout=30)


@pytest.fixture
def connects(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every address that this process connects to."""
    met: list[Any] = []
    real = socket.socket.connect

    def connect(self: socket.socket, address: Any) -> None:
        met.append(address)
        real(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect)

    async def create_connection(self: Any, factory: Any, host: Any, port: Any, **_: Any) -> Any:
        met.append((host, port))
        raise ConnectionRefusedError(f"not in this test: {host}")

    monkeypatch.setattr(asyncio.BaseEventLoop, "create_connection", create_connection)
    return met


@pytest.fixture(autouse=True)
def _every_key_expires(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test may leave one of our Redis keys without a time to live."""
    stack = request.getfixturevalue("stack") if "stack" in request.fixturenames else None
    yield
    if stack is None:
        return
    with connect(stack.settings()) as raw:
        keys = list(raw.scan_iter("blipq:*"))
        forever = [key for key in keys if raw.ttl(key) == -1]
    assert not forever, f"keys without a time to live: {forever}"


def blipq(
    *arguments: str, stack: LocalStack | None = None, **extra: str
) -> subprocess.CompletedProcess[str]:
    """Runs the `blipq` command."""
    environment = {**os.environ, **(stack.environment() if stack else {}), **extra}
    return subprocess.run(
        [sys.executable, "-m", "blipq", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=90,
    )
