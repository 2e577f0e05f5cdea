"""Real doors: `blipq api` as a process, on a database of its own."""

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

from blipq import Settings
from blipq.local.stack import LocalStack
from blipq.local.supervisor import Service
from conftest import KNOWN_MODELS, wait_until
from producer.conftest import client, ledger, own_redis, raw_redis

#: The door's tests, too, play the worker's part through the ledger.
__all__ = ["client", "ledger", "own_redis", "raw_redis"]

CAPTION = {"kind": "caption", "image": "s3://photos/cat.jpg"}
RESULT = '{"kind": "caption", "captions": [{"text": "a cat"}]}'


@dataclass
class DoorProcess:
    """A door that runs."""

    service: Service
    url: str
    log: Path

    def http(self, key: str | None = None, **headers: str) -> httpx2.Client:
        """A client for it. Close it, or use it as a context."""
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        return httpx2.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False)

    def logged(self) -> str:
        return self.log.read_text()


Start = Callable[..., DoorProcess]


@pytest.fixture
def start(stack: LocalStack, apart: Settings, tmp_path: Path) -> Iterator[Start]:
    """Starts doors; files: how many each may open at first; options are BLIPQ_* settings."""
    started: list[Service] = []

    def start(*arguments: str, files: int | None = None, **options: str) -> DoorProcess:
        service = service_of(stack, apart, tmp_path / f"door{len(started)}.log", arguments, options)
        if files is not None:  # its limit alone: this process may have more open than that
            limited = f'ulimit -Sn {files}; exec "$0" "$@"'
            service.command = ["sh", "-c", limited, *service.command]
        started.append(service)
        return running(service)

    yield start
    for service in started:
        service.stop(timeout=30)


def beside(stack: LocalStack) -> Settings:
    """The settings of ``apart``, for what outlives a test."""
    fields = stack.settings_fields()
    fields["redis_url"] = fields["redis_url"].removesuffix("/0") + "/1"
    return Settings.model_validate(fields | {"known_models": KNOWN_MODELS})


def service_of(
    stack: LocalStack,
    settings: Settings,
    log: Path,
    arguments: tuple[str, ...] = (),
    options: dict[str, str] | None = None,
) -> Service:
    environment = stack.environment() | {"BLIPQ_REDIS_URL": settings.redis_url}
    environment |= {"BLIPQ_KNOWN_MODELS": ",".join(settings.known_models)}
    environment |= {f"BLIPQ_{name.upper()}": value for name, value in (options or {}).items()}
    command = [sys.executable, "-m", "blipq", "api", "--port", "0", *arguments]
    return Service("door", command, env=environment, log=log)


def running(service: Service) -> DoorProcess:
    """Starts a door, and waits until it says where it is."""
    assert service.log is not None
    log = service.log
    service.start()
    found: list[Any] = []

    def told() -> bool:
        assert service.exit_code is None, service.last_words(40)
        found[:] = re.findall(r"is (http://\S+)", log.read_text())
        return bool(found)

    wait_until(told, "the door")
    return DoorProcess(service, found[0], log)


@pytest.fixture(scope="module")
def open_door(stack: LocalStack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DoorProcess]:
    service = service_of(stack, beside(stack), tmp_path_factory.mktemp("door") / "door.log")
    yield running(service)
    service.stop(timeout=30)


@pytest.fixture
def door(open_door: DoorProcess, apart: Settings) -> DoorProcess:
    """A door without keys, on a database that is empty."""
    return open_door


@pytest.fixture
def http(door: DoorProcess) -> Iterator[httpx2.Client]:
    with door.http() as client:
        yield client
