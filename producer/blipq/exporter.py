"""Prometheus metrics: a registry for a process, and how it is served."""

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from socketserver import ThreadingMixIn
from types import MappingProxyType
from typing import TYPE_CHECKING, cast
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import redis
from prometheus_client import (
    CollectorRegistry,
    PlatformCollector,
    ProcessCollector,
    make_wsgi_app,
)

from blipq.errors import InvalidRequest

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

#: From a step on a GPU to a job that waits for minutes.
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)

#: All IPv4 addresses of this machine, as a scraper comes from elsewhere.
ANYWHERE = "0.0.0.0"  # noqa: S104


def new_registry() -> CollectorRegistry:
    """A registry of this process' own metrics: CPU, memory, open files."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    return registry


class _Quiet(WSGIRequestHandler):
    timeout = 10

    def log_message(self, format: str, *args: object) -> None:
        """A scrape every few seconds is no news."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


Pages = Mapping[str, Callable[[str], Mapping[str, float]]]


def _app(registry: CollectorRegistry, pages: Pages) -> "WSGIApplication":
    """Metrics at any path, but for pages of JSON by the first part of theirs."""
    metrics = make_wsgi_app(registry)

    def app(environ: "WSGIEnvironment", start: "StartResponse") -> "Iterable[bytes]":
        first, _, rest = environ.get("PATH_INFO", "").lstrip("/").partition("/")
        if first not in pages:
            return cast("Iterable[bytes]", metrics(environ, start))
        try:
            status, body = "200 OK", json.dumps(pages[first](rest))
        except redis.RedisError as error:
            status, body = "503 Service Unavailable", json.dumps({"error": type(error).__name__})
        start(status, [("Content-Type", "application/json")])
        return [body.encode()]

    return app


@contextmanager
def served(
    registry: CollectorRegistry,
    port: int | None,
    host: str = ANYWHERE,
    pages: Pages = MappingProxyType({}),
) -> Iterator[int | None]:
    """Answers ``/metrics`` on the port, if there is one; 0 takes a free one. Yields the port.

    pages: of JSON by the first part of their path, made from the rest of it; an error of
    Redis' is a 503.

    Raises InvalidRequest if the port is taken, or the host is no address of this machine.
    """
    if port is None:
        yield None
        return
    try:
        server = make_server(host, port, _app(registry, pages), _Server, _Quiet)
    except OSError as error:
        message = f"cannot serve metrics on {host}:{port}: {error.strerror}: name another port"
        raise InvalidRequest(message) from None
    thread = threading.Thread(target=server.serve_forever, name="blipq-metrics", daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)
