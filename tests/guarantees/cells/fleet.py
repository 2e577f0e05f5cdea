"""Cells for tests: a real Redis each, with a file that survives its death."""

import time
from pathlib import Path
from typing import Any

from blipq import Settings
from blipq.ledger.cells.health import FRESH_S
from blipq.ledger.connection import connect
from blipq.ledger.worker import Claim, WorkerLedger
from blipq.local.stack import free_port, redis_command
from blipq.local.supervisor import Service
from guarantees.cells.servers import Server

RESULT = '{"kind": "caption", "captions": [{"text": "a cat"}]}'


class Fleet:
    """Redis servers by name: each is a cell, whose jobs may name some models."""

    def __init__(self, folder: Path, names: str, **options: Any) -> None:
        self.ports = {name: free_port() for name in names}
        self._options = {"known_models": ("default", "m"), "timeout_s": 2, **options}
        settings = self.settings()
        self.servers = {
            name: Server(self._service(folder, name), settings.in_cell(name)) for name in names
        }
        for name in names:
            self.start(name)

    def _service(self, folder: Path, name: str) -> Service:
        (folder / name).mkdir(parents=True)
        options = {"port": self.ports[name], "bind": "127.0.0.1", "dir": folder / name}
        options |= {"save": "", "appendonly": "yes"}
        flat = [text for key, value in options.items() for text in (f"--{key}", str(value))]
        return Service("redis", [redis_command(), *flat], log=folder / f"{name}.log")

    def start(self, name: str) -> None:
        self.servers[name].start()

    def kill(self, name: str) -> None:
        """kill -9. Afterwards no client counts the cell as one that answered just now."""
        self.servers[name].kill()
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
        return {
            name: server.keys(pattern) for name, server in self.servers.items() if server.answers()
        }

    def records(self) -> dict[str, set[str]]:
        """The ids of the jobs that each live cell has."""
        found = self.keys("blipq:job:*")
        return {
            name: {key.removeprefix("blipq:job:") for key in keys} for name, keys in found.items()
        }

    def stop(self) -> None:
        for server in self.servers.values():
            server.thaw()
            server.service.stop()


def finish(fleet: Fleet, id: str, cell: str) -> None:
    """Ends a job as a worker of its cell."""
    settings = fleet.servers[cell].settings
    with connect(settings) as raw:
        ledger = WorkerLedger(raw, settings)
        claim = ledger.claim(id, "w", lease_s=30)
        assert isinstance(claim, Claim)
        assert ledger.succeed(claim, RESULT, "{}")
