"""A Redis server that tests kill, freeze, and look into."""

import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from blipq import Settings
from blipq.ledger.connection import connect
from blipq.local.supervisor import Service
from conftest import wait_until


@dataclass(frozen=True)
class Server:
    """A server, and settings of a client of it alone."""

    service: Service
    settings: Settings

    def redis(self, do: Callable[[Any], Any]) -> Any:
        with connect(self.settings) as raw:
            return do(raw)

    def kill(self) -> None:
        """kill -9."""
        self.service.signal(signal.SIGKILL)
        wait_until(lambda: self.service.exit_code is not None, "Redis' death")

    def start(self) -> None:
        """Starts it on the data that it has."""
        self.service.start()
        wait_until(self.answers, "Redis")

    def answers(self) -> bool:
        with suppress(Exception):
            return bool(self.redis(lambda raw: raw.ping()))
        return False

    def freeze(self) -> None:
        """Its connections stay open, and nothing answers."""
        self.service.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.service.signal(signal.SIGCONT)

    def keys(self, pattern: str) -> list[str]:
        """The keys that it has."""
        return list(self.redis(lambda raw: list(raw.scan_iter(pattern, count=1000))))

    def keys_without_ttl(self) -> list[str]:
        """Our keys that would live for ever."""

        def forever(raw: Any) -> list[str]:
            return [key for key in raw.scan_iter("blipq:*") if raw.ttl(key) == -1]

        return list(self.redis(forever))
