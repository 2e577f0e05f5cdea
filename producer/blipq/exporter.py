"""Prometheus metrics: a registry for a process, and how it is served."""

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import (
    CollectorRegistry,
    PlatformCollector,
    ProcessCollector,
    start_http_server,
)

from blipq.errors import InvalidRequest

#: From a step on a GPU to a job that waits for minutes.
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)

#: All IPv4 addresses of this machine, as a scraper comes from elsewhere.
ANYWHERE = "0.0.0.0"  # noqa: S104


def new_registry() -> CollectorRegistry:
    """A registry that tells about this process: CPU, memory, open files."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    return registry


@contextmanager
def served(
    registry: CollectorRegistry, port: int | None, host: str = ANYWHERE
) -> Iterator[int | None]:
    """Answers ``/metrics`` on the port, if there is one; 0 takes a free one. Yields the port.

    Raises InvalidRequest if the port is taken, or the host is no address of this machine.
    """
    if port is None:
        yield None
        return
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        raise InvalidRequest(f"cannot serve metrics on {host}:{port}: {error}") from None
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)
