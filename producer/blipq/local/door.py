"""The HTTP door of a local stack: on loopback, with a key that its first start makes."""

import importlib.util
import os
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from blipq.local.supervisor import Service

KEYS = "BLIPQ_API_KEYS"
NO_DOOR = (
    "no HTTP door here: install the wheel of blipq-api, which is on no package index, or run pip "
    "install '.[api]' in a clone of blipq"
)
_NEEDED = ("blipq_api", "httptools", "python_multipart", "starlette", "uvicorn")


def has_door() -> bool:
    """Whether ``blipq-api`` is here with what it needs: a clone's root installs its code alone."""
    return all(map(importlib.util.find_spec, _NEEDED))


class LocalDoor:
    """``blipq api`` as a service of the stack in a folder."""

    def __init__(self, folder: Path, port: int) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self._log = folder / "api.log"
        self._keys = folder / "api" / "keys.toml"
        self._key = self._keys.with_suffix(".key")
        self._is_new = not self._key.exists()

    def service(self, environment: dict[str, str]) -> Service:
        """The process. Where the user names a file of keys, that is taken, and no key is made."""
        command = [sys.executable, "-P", "-m", "blipq", "api", "--port", str(self.port)]
        keys = {}
        if KEYS not in os.environ:
            command.append("--make-key")
            keys[KEYS] = str(self._keys)
        return Service("api", command, env={**environment, **keys}, log=self._log)

    def introduce(self, report: Callable[[str], None], stop: threading.Event) -> None:
        """Once the door answers: its address, where its key is, and the key if it is new."""
        while not stop.wait(0.2):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    break
        else:
            return
        report(f"HTTP at {self.url} (docs: {self.url}/docs; log: {self._log})")
        if KEYS not in os.environ:
            key = f"{self._key.read_text().strip()} (kept in {self._key})"
            report(f"its key: {key if self._is_new else f'in {self._key}'}")
