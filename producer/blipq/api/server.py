"""``blipq api``: the door under uvicorn, until SIGTERM."""

import asyncio
import ipaddress
import logging
import signal
import socket
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from blipq.api.app import app_of
from blipq.api.door import Door
from blipq.api.settings import ApiSettings
from blipq.errors import InvalidRequest
from blipq.telemetry import tracing
from blipq.telemetry.logs import set_up_logging

#: The door would serve strangers: starting it again would not help.
EXIT_NO_KEYS = 78
#: Of one request's line and headers.
MOST_HEADER_BYTES = 64 * 1024
#: Longest wait for them, on a new connection and behind an earlier request.
HEADER_TIMEOUT_S = 15.0
KEEP_ALIVE_S = 75


class BoundedProtocol(HttpToolsProtocol):
    """HTTP/1.1 whose heads have a largest size, and are waited for so long.

    uvicorn bounds neither with this parser: a head that never ends would fill the memory.
    """

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._in_head, self._head_bytes = True, 0
        self._late = self.loop.call_later(HEADER_TIMEOUT_S, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        self._late.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > MOST_HEADER_BYTES:
                self._give_up()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0
        self._late.cancel()
        self._late = self.loop.call_later(HEADER_TIMEOUT_S, self._give_up)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._late.cancel()
        super().on_headers_complete()

    def _give_up(self) -> None:
        if self._in_head and not self.transport.is_closing():
            self.transport.close()


class Server(uvicorn.Server):
    """Tells the door when to drain, and ends with 0 on a signal."""

    def __init__(self, config: uvicorn.Config, door: Door) -> None:
        super().__init__(config)
        self._door = door

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        """Uvicorn's own would raise the signal again at the end."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Whoever waits is answered now; requests under way get their time."""
        self._door.draining.set()
        await super().shutdown(sockets)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bound(host: str, port: int) -> socket.socket:
    """A listening socket. Raises InvalidRequest if the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=2048)
        # asyncio sets this only on sockets that name their protocol. Without it each answer, which
        # is written in two parts, waits 40 ms for the other side's acknowledgement.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listening
    except OSError as error:
        raise InvalidRequest(f"cannot listen on {host} port {port}: {error.strerror}") from None


def run(settings: ApiSettings, host: str, port: int, tell: Callable[[str], None]) -> None:
    """Serves until SIGTERM or SIGINT. Raises InvalidRequest for a port or a file that is wrong."""
    set_up_logging()
    tracing.start("blipq-api")
    _log_access()
    with bound(host, port) as listening:
        asyncio.run(_serve(settings, listening, tell))


def _log_access() -> None:
    """One JSON object a line on stdout, apart from the log."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    access = logging.getLogger("blipq.api.access")
    access.setLevel(logging.INFO)
    access.addHandler(handler)
    access.propagate = False


async def _serve(
    settings: ApiSettings, listening: socket.socket, tell: Callable[[str], None]
) -> None:
    door = Door(settings)
    config = uvicorn.Config(
        app_of(door),
        http=BoundedProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=bool(settings.api_trusted_proxies),
        forwarded_allow_ips=list(settings.api_trusted_proxies),
        # The door answers with 503 before this; connections that say nothing count here alone.
        limit_concurrency=2 * settings.api_concurrency,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, round(settings.api_drain_s)),
    )
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    tell(f"the door of {settings.endpoints} is http://{shown}:{port}")
    await Server(config, door).serve(sockets=[listening])
