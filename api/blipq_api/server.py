"""``blipq api``: the door under uvicorn, until SIGTERM."""

import asyncio
import ipaddress
import logging
import resource
import signal
import socket
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from enum import Enum, auto
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from blipq.errors import InvalidRequest
from blipq.telemetry import tracing
from blipq.telemetry.logs import set_up_logging
from blipq_api.app import app_of
from blipq_api.door import Door
from blipq_api.settings import ApiSettings

#: The door would serve strangers: starting it again would not help.
EXIT_NO_KEYS = 78
#: Of one request's line and headers; of what surrounds the parts of a chunked body, too.
MOST_HEADER_BYTES = 64 * 1024
MOST_HEADERS = 256
#: Longest wait for them, on a new connection and behind an earlier request.
HEADER_TIMEOUT_S = 15.0
KEEP_ALIVE_S = 75
#: What still comes of a body once its answer is sent is read, so that the answer is not lost on a
#: client that sends first and reads then; behind these the connection ends.
LATE_BODY_TIMEOUT_S = 5.0
MOST_LATE_BODY_BYTES = 2**20
#: A client that takes nothing of an answer for so long is given up.
WRITE_TIMEOUT_S = 60.0
#: Files beside connections: of Redis, S3, logs and libraries.
SPARE_FILES = 256

log = logging.getLogger(__name__)


class _Part(Enum):
    """What of a request a connection waits for."""

    NOTHING = auto()
    HEAD = auto()
    BODY = auto()
    LATE_BODY = auto()


class BoundedProtocol(HttpToolsProtocol):
    """HTTP/1.1 whose parts have a largest size, and are waited for so long.

    uvicorn bounds neither with this parser: a head or a trailer that never ends would fill the
    memory, and a body that is not read would keep the connection for ever.
    """

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._read = 0
        self._limit: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None
        self._expect(_Part.HEAD, HEADER_TIMEOUT_S)

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect(_Part.NOTHING)
        self._take_up()
        super().connection_lost(exc)

    def _expect(self, part: _Part, seconds: float | None = None) -> None:
        """What comes next, and how long it may take."""
        self._part, self._bytes, self._headers = part, 0, 0
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None
        if seconds is not None:
            self._limit = self.loop.call_later(seconds, self._give_up)

    def data_received(self, data: bytes) -> None:
        if self._part is _Part.NOTHING and self.cycle.response_complete:
            # Also of what begins no request, such as an empty line: uvicorn's timer is off now.
            self._expect(_Part.HEAD, HEADER_TIMEOUT_S)
        self._read = len(data)
        super().data_received(data)
        self._bytes += self._read
        most = MOST_LATE_BODY_BYTES if self._part is _Part.LATE_BODY else MOST_HEADER_BYTES
        if self._part is not _Part.NOTHING and self._bytes > most:
            self._give_up()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._expect(_Part.HEAD, HEADER_TIMEOUT_S)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers += 1
        if self._headers > MOST_HEADERS:
            self._give_up()
        elif (
            self._part is _Part.HEAD
        ):  # a trailer must not become a header: the gate has read those
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._expect(_Part.BODY)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if self._part is _Part.BODY:  # what counts is what comes beside it: chunks' heads, trailers
            self._bytes = -self._read
        super().on_body(body)

    def on_message_complete(self) -> None:
        answered = self._part is _Part.LATE_BODY
        self._expect(_Part.NOTHING)
        super().on_message_complete()
        if answered:  # uvicorn's own timer ended when more of the body came
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._cut_off_later()
        # Behind pipelined requests the body under way is of the last one.
        elif self._part is _Part.BODY and self.cycle.response_complete:
            self._expect(_Part.LATE_BODY, LATE_BODY_TIMEOUT_S)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(WRITE_TIMEOUT_S, self.transport.abort)

    def resume_writing(self) -> None:
        self._take_up()
        super().resume_writing()

    def _take_up(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _give_up(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()
            self._cut_off_later()

    def _cut_off_later(self) -> None:
        """Closing waits until the client has taken the answer: not for ever."""
        self._expect(_Part.NOTHING)
        self._limit = self.loop.call_later(WRITE_TIMEOUT_S, self.transport.abort)


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
        # Python adds the address to what the system says of a port that is taken.
        why = str(error.strerror).partition(" (while")[0]
        message = f"cannot listen on {host} port {port}: {why}: give another --port, or --host"
        raise InvalidRequest(message) from None


def run(settings: ApiSettings, host: str, port: int, report: Callable[[str], None]) -> None:
    """Serves until SIGTERM or SIGINT. Raises InvalidRequest for a port or a file that is wrong."""
    set_up_logging()
    tracing.start("blipq-api")
    _log_access()
    allow_files(2 * settings.api_concurrency + SPARE_FILES)
    with bound(host, port) as listening:
        asyncio.run(_serve(settings, listening, report))


def allow_files(wanted: int) -> None:
    """Has this process open so many files, or as many as it may: most are let have 1,024 at first.

    Without room for a connection nothing else is opened either, to Redis for example.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    possible = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < possible:
        resource.setrlimit(resource.RLIMIT_NOFILE, (possible, hard))
    if possible < wanted:
        text = "this process may open %d files, and BLIPQ_API_CONCURRENCY needs %d: raise ulimit -n"
        log.warning(text, possible, wanted)


def _log_access() -> None:
    """One JSON object a line on stdout, apart from the log."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    access = logging.getLogger("blipq_api.access")
    access.setLevel(logging.INFO)
    access.addHandler(handler)
    access.propagate = False


async def _serve(
    settings: ApiSettings, listening: socket.socket, report: Callable[[str], None]
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
    report(f"the door of {settings.endpoints} is http://{shown}:{port}")
    await Server(config, door).serve(sockets=[listening])
