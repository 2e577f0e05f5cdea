"""``/healthz``, ``/readyz`` and ``/metrics`` over HTTP, for whatever looks after workers.

Live: the model makes progress and the broker loop turns; a process that is not should be ended.
Ready: the models are loaded and checked, Redis answers, and the worker is not draining.
"""

import json
import threading
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CONTENT_TYPE_LATEST

from blipq.redaction import redacted

#: A broker loop that has not turned for this long is stuck, unless Redis itself is away.
LONGEST_TURN_S = 60.0
#: How often the loop says that it turns.
TURN_S = 2.0

Checks = Mapping[str, Callable[[], str | None]]
#: Content type and text of ``/metrics``, by the header Accept.
Metrics = Callable[[str], tuple[str, bytes]]
#: Status, content type and body.
Answer = tuple[int, str, bytes]


class PortTaken(Exception):
    """The port cannot be listened on, now."""


def require_port(port: int | None, host: str = "") -> None:
    """Raises PortTaken if the port cannot be had: known before minutes go into models."""
    if port is not None:
        _listening(port, BaseHTTPRequestHandler, host).server_close()


def _listening(
    port: int, handler: type[BaseHTTPRequestHandler], host: str = ""
) -> ThreadingHTTPServer:
    try:
        return ThreadingHTTPServer((host, port), handler)
    except OSError as error:
        why = error.strerror or error
        place = f"port {port} of {host}" if host else f"port {port}"
        raise PortTaken(f"BLIPQ_HEALTH_PORT: cannot listen on {place}: {why}") from error


def _checked(checks: Checks) -> Answer:
    found = {name: _asked(check) for name, check in checks.items()}
    wrong = any(problem is not None for problem in found.values())
    report = {name: "ok" if problem is None else problem for name, problem in found.items()}
    return 503 if wrong else 200, "application/json", json.dumps(report).encode()


def _asked(check: Callable[[], str | None]) -> str | None:
    try:
        problem = check()
    except Exception as error:  # a check that cannot be made is not passed
        problem = f"{type(error).__name__}: {error}"
    return None if problem is None else redacted(problem) or "failed"


def _page(metrics: Metrics, accept: str) -> Answer:
    try:
        return 200, *metrics(accept)
    except Exception as error:
        shown = redacted(f"{type(error).__name__}: {error}")
        return 500, "text/plain; charset=utf-8", shown.encode(errors="replace")


class BrokerLoop:
    """When Celery's consumer loop last turned, and what keeps it from taking messages."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._problem: str | None = None

    def turned(self) -> None:
        """Called from the loop itself."""
        self._last, self._problem = time.monotonic(), None

    def failed(self, error: object) -> None:
        """It is alive, and tries to connect again."""
        self._last, self._problem = time.monotonic(), f"not connected: {error}"

    @property
    def turning(self) -> bool:
        """Whether it has turned lately, and so would hand on a message that came."""
        return self._problem is None and time.monotonic() - self._last < 3 * TURN_S

    def away(self) -> str | None:
        """Why it takes no messages, or None."""
        return self._problem or self.stuck()

    def stuck(self) -> str | None:
        """What is wrong, or None."""
        age = time.monotonic() - self._last
        return f"no turn for {age:.0f} s" if age > LONGEST_TURN_S else None


class HealthServer:
    """Answers 200 with what was checked, or 503 with what is wrong. Raises PortTaken."""

    def __init__(
        self,
        port: int,
        live: Checks,
        ready: Checks,
        metrics: Metrics = lambda accept: (CONTENT_TYPE_LATEST, b""),
        host: str = "",
    ) -> None:
        checks = {"/healthz": live, "/readyz": ready}

        class Handler(BaseHTTPRequestHandler):
            timeout = 5

            def do_GET(self) -> None:
                if self.path == "/metrics":
                    self._reply(*_page(metrics, self.headers.get("Accept", "")))
                elif self.path in checks:
                    self._reply(*_checked(checks[self.path]))
                else:
                    self.send_error(404)

            def _reply(self, status: int, kind: str, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """A probe every few seconds is no news."""

        self._server = _listening(port, Handler, host)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="blipq-health", daemon=True
        )

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
