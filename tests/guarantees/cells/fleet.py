"""Cells for tests: a real Redis each, with a file that survives its death."""

import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import redis

from blipq import Settings
from blipq.ledger.cells.health import FRESH_S
from blipq.local.stack import free_port, redis_command
from blipq.local.supervisor import Service
from conftest import wait_until


class Fleet:
    """Redis servers by name: each is a cell, whose jobs may name some models."""

    def __init__(self, folder: Path, names: str, **options: Any) -> None:
        self.ports = {name: free_port() for name in names}
        self._options = {"known_models": ("default", "m"), "timeout_s": 2, **options}
        self._services = {name: self._service(folder, name) for name in names}
        for name in names:
            self.start(name)

    def _service(self, folder: Path, name: str) -> Service:
        (folder / name).mkdir(parents=True)
        options = {"port": self.ports[name], "bind": "127.0.0.1", "dir": folder / name}
        options |= {"save": "", "appendonly": "yes"}
        flat = [text for key, value in options.items() for text in (f"--{key}", str(value))]
        return Service("redis", [redis_command(), *flat], log=folder / f"{name}.log")

    def start(self, name: str) -> None:
        self._services[name].start()
        with redis.Redis(port=self.ports[name], socket_timeout=5) as raw:
            wait_until(lambda: _answers(raw), "Redis")

    def kill(self, name: str) -> None:
        """kill -9. Afterwards no client counts the cell as one that answered just now."""
        self._services[name].signal(signal.SIGKILL)
        wait_until(lambda: self._services[name].exit_code is not None, "Redis' death")
        time.sleep(2 * FRESH_S)

    @property
    def cells(self) -> str:
        """As ``BLIPQ_CELLS`` has them."""
        return " ".join(f"{name}=redis://127.0.0.1:{port}/0" for name, port in self.ports.items())

    def settings(self, lists: str = "", **options: Any) -> Settings:
        """Of a client whose lists of cells these are."""
        lists = lists or f"1={','.join(self.ports)}"
        given = {**self._options, "cells": self.cells, "cell_lists": lists, **options}
        return Settings.model_validate(given)

    def keys(self, pattern: str) -> dict[str, list[str]]:
        """The keys that each live cell has."""
        found = {}
        for name, port in self.ports.items():
            with (
                redis.Redis(port=port, decode_responses=True, socket_timeout=5) as raw,
                suppress(redis.ConnectionError),
            ):
                found[name] = list(raw.scan_iter(pattern, count=1000))
        return found

    def records(self) -> dict[str, set[str]]:
        """The ids of the jobs that each live cell has."""
        found = self.keys("blipq:job:*")
        return {
            name: {key.removeprefix("blipq:job:") for key in keys} for name, keys in found.items()
        }

    def stop(self) -> None:
        for service in self._services.values():
            service.stop()


def _answers(raw: "redis.Redis") -> bool:
    with suppress(redis.RedisError):
        return bool(raw.ping())
    return False
