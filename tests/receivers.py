"""A receiver of webhooks that behaves as a test wants, and remembers what reached it."""

import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from blipq.webhooks.delivery import new_secret

#: Signs and verifies in all tests.
SECRET = new_secret()
#: An answer: a status, a status and headers, or "drop" (no answer) or "hang" (none for long).
Behaviour = Callable[["Got"], Any]


@dataclass(frozen=True)
class Got:
    """One request as it came."""

    path: str
    headers: dict[str, str]
    body: bytes
    number: int  # how often this webhook-id came, from 1
    at: float = field(default_factory=time.monotonic)

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]


class Receiver:
    """An HTTP server on loopback."""

    def __init__(self, behave: Behaviour = lambda got: 200) -> None:
        self.behave = behave
        self.got: list[Got] = []
        self.delivered: dict[str, int] = defaultdict(int)  # by id: how often it was answered 2xx
        self._times: dict[str, int] = defaultdict(int)
        self.connections = 0
        self.holding = 0
        self.most_held = 0
        self.closing = threading.Event()
        self._lock = threading.Lock()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                receiver.answer(self)

            def log_message(self, *_: Any) -> None:
                """Quiet."""

        class Server(ThreadingHTTPServer):
            request_queue_size = 256
            daemon_threads = True

            def verify_request(self, *_: Any) -> bool:
                receiver.connections += 1
                return True

            def handle_error(self, *_: Any) -> None:
                """A sender that goes away is no error here."""

        self.server = Server(("127.0.0.1", 0), Handler)
        self.port: int = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/hook"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        headers = {name.lower(): value for name, value in handler.headers.items()}
        body = handler.rfile.read(int(headers["content-length"]))
        with self._lock:
            self._times[headers.get("webhook-id", "")] += 1
            got = Got(handler.path, headers, body, self._times[headers.get("webhook-id", "")])
            self.got.append(got)
        behaviour = self.behave(got)
        if behaviour == "hang":
            self._hold(handler.connection)
            return
        if behaviour == "drop":
            handler.connection.shutdown(socket.SHUT_RDWR)
            return
        status, extra = behaviour if isinstance(behaviour, tuple) else (behaviour, {})
        with suppress(OSError):
            handler.send_response(status)
            for name, value in extra.items():
                handler.send_header(name, value)
            handler.send_header("content-length", "0")
            handler.end_headers()
            handler.wfile.flush()
        if 200 <= status < 300:
            with self._lock:
                self.delivered[got.headers.get("webhook-id", "")] += 1

    def _hold(self, connection: socket.socket) -> None:
        """Says nothing until the sender goes away."""
        with self._lock:
            self.holding += 1
            self.most_held = max(self.most_held, self.holding)
        connection.settimeout(2)
        while not self.closing.is_set() and not _closed(connection):
            pass
        with self._lock:
            self.holding -= 1

    def close(self) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()


def _closed(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


@contextmanager
def receiving(behave: Behaviour = lambda got: 200) -> Iterator[Receiver]:
    receiver = Receiver(behave)
    try:
        yield receiver
    finally:
        receiver.close()
