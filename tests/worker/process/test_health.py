"""What the health port answers while something is wrong."""

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from blipq_worker.process.health import Checks, HealthServer, PortTaken, require_port


@contextmanager
def serving(ready: Checks, metrics: Callable[[], bytes] = lambda: b"") -> Iterator[str]:
    page = lambda accept: ("text/plain", metrics())  # noqa: E731
    server = HealthServer(0, live={}, ready=ready, metrics=page)
    server.start()
    try:
        yield f"http://127.0.0.1:{server.port}"
    finally:
        server.stop()


def answer(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=10) as answered:
            return answered.status, answered.read().decode()
    except urllib.error.HTTPError as refused:
        with refused:
            return refused.code, refused.read().decode()


def raises(error: Exception) -> Callable[[], str | None]:
    def check() -> str | None:
        raise error

    return check


def test_a_check_that_raises_is_not_passed() -> None:
    """The connection was closed without an answer."""
    checks = {
        "s3": raises(ValueError("Invalid endpoint: https://key:hush@s3.example")),
        "redis": lambda: None,
    }
    with serving(checks) as url:
        status, body = answer(f"{url}/readyz")
    assert status == 503
    told = json.loads(body)
    assert told["redis"] == "ok"
    assert told["s3"].startswith("ValueError: Invalid endpoint")
    assert "hush" not in body


def test_a_problem_without_words_is_no_ok() -> None:
    with serving({"redis": lambda: ""}) as url:
        assert answer(f"{url}/readyz") == (503, '{"redis": "failed"}')


def test_what_a_check_says_shows_no_password() -> None:
    with serving({"redis": lambda: "redis://:hush@redis.example/0 is away"}) as url:
        status, body = answer(f"{url}/readyz")
    assert status == 503
    assert "hush" not in body


def test_metrics_that_cannot_be_had_are_an_answer() -> None:
    def broken() -> bytes:
        raise RuntimeError("no such gauge")

    with serving({}, broken) as url:
        assert answer(f"{url}/metrics") == (500, "RuntimeError: no such gauge")


def test_a_port_has_one_server() -> None:
    with serving({}) as url:
        port = int(url.rpartition(":")[2])
        with pytest.raises(PortTaken, match=f"BLIPQ_HEALTH_PORT: cannot listen on port {port}"):
            HealthServer(port, live={}, ready={})


def test_a_port_may_be_open_at_one_address_alone() -> None:
    server = HealthServer(0, live={}, ready={}, host="127.0.0.1")
    assert server._server.server_address[0] == "127.0.0.1"
    server._server.server_close()
    with pytest.raises(PortTaken, match=r"of 192\.0\.2\.1"):
        require_port(0, "192.0.2.1")
