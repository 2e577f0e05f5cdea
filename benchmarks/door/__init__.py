"""What the HTTP door costs: submits beside the Python client's, clients that wait, pages.

``python -m benchmarks.door [--jobs N]`` measures all of it and writes the tables of docs/http.md.
"""

import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from blipq import Settings
from blipq.local.stack import LocalStack
from blipq.local.supervisor import Service

START_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Door:
    """A door without keys that runs."""

    service: Service
    url: str

    @property
    def host(self) -> tuple[str, int]:
        """Where the door listens."""
        host, _, port = self.url.removeprefix("http://").partition(":")
        return host, int(port)

    def http(self) -> httpx2.Client:
        """A client of the door."""
        return httpx2.Client(base_url=self.url, timeout=120, trust_env=False)


@dataclass(frozen=True)
class Measured(Door):
    """A stack of its own, and a door on it."""

    stack: LocalStack
    settings: Settings


@contextmanager
def running(**options: str) -> Iterator[Measured]:
    """Starts Redis, S3 and a door; options are BLIPQ_* settings of both sides."""
    with tempfile.TemporaryDirectory() as folder:
        stack = LocalStack(Path(folder))
        stack.start()
        named = {f"BLIPQ_{name.upper()}": value for name, value in options.items()}
        fields: dict[str, Any] = {**stack.settings_fields(), **options}
        settings = Settings.model_validate(fields)
        try:
            with door_on({**stack.environment(), **named}, Path(folder) / "door.log") as door:
                yield Measured(door.service, door.url, stack, settings)
        finally:
            stack.stop()


@contextmanager
def door_on(environment: Mapping[str, str], log: Path) -> Iterator[Door]:
    """Starts a door, and waits until it says where it is."""
    command = [sys.executable, "-m", "blipq", "api", "--port", "0"]
    service = Service("door", command, env=environment, log=log)
    service.start()
    try:
        yield Door(service, _url(log))
    finally:
        service.stop(timeout=30)


def _url(log: Path) -> str:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if found := re.search(r" is (http://\S+)", log.read_text()):
            return found[1]
        time.sleep(0.05)
    raise TimeoutError(f"the door did not start: {log.read_text()[-2000:]}")
