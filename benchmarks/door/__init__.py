"""What the HTTP door costs: submits beside the Python client's, clients that wait, pages.

``python -m benchmarks.door [--jobs N]`` measures all of it and writes the tables of docs/http.md.
"""

import re
import sys
import tempfile
import time
from collections.abc import Iterator
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
class Measured:
    """A stack of its own, and a door without keys on it."""

    stack: LocalStack
    settings: Settings
    door: Service
    url: str

    @property
    def host(self) -> tuple[str, int]:
        """Where the door listens."""
        host, _, port = self.url.removeprefix("http://").partition(":")
        return host, int(port)

    def http(self) -> httpx2.Client:
        """A client of the door."""
        return httpx2.Client(base_url=self.url, timeout=120, trust_env=False)


@contextmanager
def running(**options: str) -> Iterator[Measured]:
    """Starts Redis, S3 and a door; options are BLIPQ_* settings of both sides."""
    with tempfile.TemporaryDirectory() as folder:
        stack = LocalStack(Path(folder))
        stack.start()
        named = {f"BLIPQ_{name.upper()}": value for name, value in options.items()}
        log = Path(folder) / "door.log"
        command = [sys.executable, "-m", "blipq", "api", "--port", "0"]
        door = Service("door", command, env={**stack.environment(), **named}, log=log)
        door.start()
        try:
            fields: dict[str, Any] = {**stack.settings_fields(), **options}
            yield Measured(stack, Settings.model_validate(fields), door, _url(log))
        finally:
            door.stop(timeout=30)
            stack.stop()


def _url(log: Path) -> str:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if found := re.search(r" is (http://\S+)", log.read_text()):
            return found[1]
        time.sleep(0.05)
    raise TimeoutError(f"the door did not start: {log.read_text()[-2000:]}")
