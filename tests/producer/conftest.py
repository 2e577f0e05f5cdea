"""The producer's tests run without a worker: they play its part through the ledger."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import redis

from blipq import Client, Settings
from blipq.ledger.connection import connect
from blipq.ledger.worker import WorkerLedger
from blipq.local.stack import free_port, redis_command
from blipq.local.supervisor import Service
from conftest import wait_until


@pytest.fixture
def client(apart: Settings) -> Iterator[Client]:
    with Client(apart) as client:
        yield client


@pytest.fixture
def raw_redis(apart: Settings) -> Iterator["redis.Redis"]:
    with connect(apart) as raw:
        yield raw


@pytest.fixture
def ledger(raw_redis: "redis.Redis", apart: Settings) -> WorkerLedger:
    return WorkerLedger(raw_redis, apart)


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[Settings]:
    """A Redis that a test may fill, freeze or kill; answers are due within half a second."""
    port = free_port()
    options = {"--port": port, "--bind": "127.0.0.1", "--dir": tmp_path, "--save": ""}
    command = [redis_command(), *(str(part) for pair in options.items() for part in pair)]
    service = Service("redis", command, log=tmp_path / "redis.log")
    settings = Settings(redis_url=f"redis://127.0.0.1:{port}/0", timeout_s=0.5)
    service.start()
    with connect(settings) as raw:
        wait_until(lambda: _answers(raw), "Redis")
        yield settings
    service.stop()


def _answers(raw: "redis.Redis") -> bool:
    with suppress(redis.ConnectionError):
        return bool(raw.ping())
    return False
