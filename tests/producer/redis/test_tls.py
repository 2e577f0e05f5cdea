"""A Redis behind TLS: the ledger, the messages and the notifications, of both clients.

Whoever stands in between with a certificate of another name, or of nobody known, hears no password.

The server in the local stack's wheel has no TLS, so a proxy in front of it ends the encryption.
"""

import asyncio
import gc
import os
import shutil
import socket
import ssl
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis
from kombu import Connection
from kombu.exceptions import OperationalError
from redis.sentinel import Sentinel

from blipq import Client, InvalidRequest, Kind, QueueUnavailable, Settings
from blipq.ledger.codec import Message
from blipq.ledger.connection import connect, connect_async
from blipq.ledger.worker import Claim, WorkerLedger
from blipq.local.stack import free_port, redis_command
from blipq.local.supervisor import Service
from blipq.submission import checked
from blipq.transport.async_notifications import AsyncNotifier
from blipq.transport.broker import Broker, broker_address, make_app
from blipq.transport.notifications import Notifier
from blocking import BlockingClient
from conftest import wait_until

IMAGE = "s3://uploads/cat.jpg"
RESULT = '{"kind": "caption", "captions": [{"text": "a cat"}]}'


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for this machine and its key, in one file."""
    if shutil.which("openssl") is None:
        assert "CI" not in os.environ, "CI needs openssl"
        pytest.skip("openssl is not installed here")
    return _certificate(tmp_path_factory.mktemp("tls"), "IP:127.0.0.1")


@pytest.fixture(scope="module")
def certificate_of_another(certificate: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for another host."""
    return _certificate(tmp_path_factory.mktemp("another"), "DNS:evil.example")


def _certificate(folder: Path, name: str) -> Path:
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=localhost", "-addext", f"subjectAltName={name}"]
    command += ["-keyout", "key.pem", "-out", "certificate.pem"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=60)
    return folder / "certificate.pem"


class Proxy:
    """Takes TLS connections and passes what they say on to a plain server."""

    def __init__(self, certificate: Path, target: tuple[str, int]) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate, certificate.parent / "key.pem")
        self._target = target
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self.taken = 0
        self.heard = b""
        self.lingers_s = 0.0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listening.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                plain, _ = self._listening.accept()
                threading.Thread(target=self._serve, args=(plain,), daemon=True).start()

    def _serve(self, plain: socket.socket) -> None:
        with (
            suppress(OSError),
            self._context.wrap_socket(plain, server_side=True) as inside,
            socket.create_connection(self._target) as outside,
        ):
            self.taken += 1
            back = threading.Thread(target=_pump, args=(outside, inside), daemon=True)
            back.start()
            _pump(inside, outside, self._hear)
            outside.shutdown(socket.SHUT_RDWR)
            back.join()
            time.sleep(self.lingers_s)

    def _hear(self, data: bytes) -> None:
        self.heard += data


def _pump(
    source: socket.socket, sink: socket.socket, hear: Callable[[bytes], None] = lambda data: None
) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            hear(data)
            sink.sendall(data)


def _behind(
    certificate: Path, settings: Settings, trusted: Path
) -> Iterator[tuple[Settings, Proxy]]:
    parts = urlsplit(settings.redis_url)
    proxy = Proxy(certificate, (str(parts.hostname), int(parts.port or 6379)))
    user = parts.netloc.rpartition("@")[0]
    query = f"ssl_ca_certs={trusted}"
    url = f"rediss://{user}@127.0.0.1:{proxy.port}{parts.path}?{query}"
    yield settings.model_copy(update={"redis_url": url}), proxy
    proxy.close()


@pytest.fixture
def secured(apart: Settings, certificate: Path) -> Iterator[tuple[Settings, Proxy]]:
    yield from _behind(certificate, apart, certificate)


@pytest.fixture
def misnamed(apart: Settings, certificate_of_another: Path) -> Iterator[tuple[Settings, Proxy]]:
    """A proxy whose certificate is trusted, but is of another host."""
    yield from _behind(certificate_of_another, apart, certificate_of_another)


@pytest.mark.parametrize("opened", [Client, BlockingClient])
def test_a_job_goes_through_an_encrypted_redis(
    secured: tuple[Settings, Proxy], apart: Settings, opened: Callable[..., Any]
) -> None:
    settings, proxy = secured
    with opened(settings) as client, connect(apart) as plain:
        job = client.caption(IMAGE)
        wait_until(lambda: plain.llen("blipq.default.normal") == 1, "the message")
        ledger = WorkerLedger(plain, apart)
        claim = ledger.claim(job.id, "w1")
        assert isinstance(claim, Claim)
        ending = threading.Timer(0.3, ledger.succeed, (claim, RESULT, "{}"))
        ending.start()
        assert job.result(timeout=20).text == "a cat"
        ending.join()
    with closing(Broker(settings)) as broker:  # by which jobs are published again
        assert broker.publish(Message(Kind.CAPTION, job.id, "blipq.default.normal"))
    assert proxy.taken >= 3, "ledger, notifier and broker"


def _without_query(settings: Settings) -> Settings:
    return settings.model_copy(update={"redis_url": settings.redis_url.partition("?")[0]})


@pytest.mark.parametrize("opened", [Client, BlockingClient])
def test_a_certificate_of_nobody_known_is_refused(
    secured: tuple[Settings, Proxy], opened: Callable[..., Any]
) -> None:
    settings, proxy = secured
    with (
        opened(_without_query(settings)) as client,
        pytest.raises(QueueUnavailable, match="certificate"),
    ):
        client.caption(IMAGE)
    assert proxy.taken == 0


@pytest.mark.parametrize("lingers_s", [0.5, 5.0])
def test_an_async_notifier_leaves_no_connection_open_over_tls(
    secured: tuple[Settings, Proxy], apart: Settings, lingers_s: float
) -> None:
    """TLS ends with an answer of the server: the loop was closed before that had come."""

    settings = secured[0].model_copy(update={"timeout_s": 2.0})

    async def scenario() -> None:
        notifier = AsyncNotifier(lambda: connect_async(settings, reconnects=False), "ended:own")
        with connect(apart) as plain:
            async with notifier.watch(["job_1"]) as inbox:
                while not plain.publish("ended:own", "job_1"):
                    await asyncio.sleep(0.02)
                assert await inbox.take(5) == ["job_1"]
        await notifier.aclose()

    secured[1].lingers_s = lingers_s
    with warnings.catch_warnings(record=True) as left:
        warnings.simplefilter("always", ResourceWarning)
        asyncio.run(scenario())
        gc.collect()
    assert not [str(each.message) for each in left]


@pytest.mark.parametrize("opened", [Client, BlockingClient])
def test_a_certificate_of_another_host_is_refused(
    misnamed: tuple[Settings, Proxy], opened: Callable[..., Any]
) -> None:
    settings, proxy = misnamed
    with opened(settings) as client, pytest.raises(QueueUnavailable, match="certificate"):
        client.caption(IMAGE)
    assert proxy.taken == 0


def test_a_notification_is_heard_over_tls_at_once(
    secured: tuple[Settings, Proxy], apart: Settings
) -> None:
    settings, _ = secured
    notifier = Notifier(lambda: connect(settings), "blipq:ended:own")
    with connect(apart) as plain, notifier.watch(["job_1", "job_2"]) as inbox:
        wait_until(lambda: plain.publish("blipq:ended:own", "job_1"), "the subscription")
        assert inbox.take(5) == ["job_1"]
        plain.publish("blipq:ended:own", "job_2")
        assert inbox.take(5) == ["job_2"]
    notifier.close()


MESSAGE = Message(Kind.CAPTION, "job_1", "blipq.default.normal")


def test_messages_go_to_no_redis_that_is_not_verified(
    secured: tuple[Settings, Proxy], misnamed: tuple[Settings, Proxy]
) -> None:
    """Celery's own default trusts anybody over TLS, and sent them the password."""
    for settings, proxy in ((_without_query(secured[0]), secured[1]), misnamed):
        broker = Broker(settings)
        assert not broker.publish(MESSAGE)
        broker.close()
        assert proxy.heard == b""


def test_who_asks_for_no_verification_gets_none_on_either_side(
    misnamed: tuple[Settings, Proxy],
) -> None:
    settings, _ = misnamed
    url = settings.redis_url.partition("?")[0] + "?ssl_cert_reqs=none"
    with Client(settings.model_copy(update={"redis_url": url})) as client:
        assert client.caption(IMAGE).status() == "queued"
        wait_until(lambda: client.ledger.redis.llen("blipq.default.normal") == 1, "the message")


def test_a_rabbitmq_is_verified_by_certificate_and_name(
    secured: tuple[Settings, Proxy],
    misnamed: tuple[Settings, Proxy],
    certificate: Path,
    certificate_of_another: Path,
) -> None:
    """No RabbitMQ: whether anything is said at all is decided before the server matters."""

    def says_something(proxy: Proxy, query: str) -> bool:
        url = f"amqps://user:hush@127.0.0.1:{proxy.port}//{query}"
        address = broker_address(secured[0].model_copy(update={"broker_url": url}))
        connection = Connection(address.url, ssl=address.tls, connect_timeout=2)
        with pytest.raises(OSError):  # noqa: PT011  # refused by us, or by what is no RabbitMQ
            connection.connect()
        return proxy.heard != b""

    assert says_something(secured[1], f"?ssl_ca_certs={certificate}")
    assert not says_something(misnamed[1], f"?ssl_ca_certs={certificate_of_another}")
    assert not says_something(misnamed[1], "")
    assert says_something(misnamed[1], "?ssl_cert_reqs=none")


def test_each_rabbitmq_of_a_list_is_verified_by_its_own_name(
    secured: tuple[Settings, Proxy],
    misnamed: tuple[Settings, Proxy],
    certificate: Path,
    certificate_of_another: Path,
) -> None:
    """Kombu held every host of the list against the name of the first."""

    def says_something(proxy: Proxy, authority: Path) -> bool:
        places = "evil.example:1//", f"127.0.0.1:{proxy.port}//"
        url = ";".join(f"amqps://user:hush@{each}?ssl_ca_certs={authority}" for each in places)
        app = make_app(secured[0].model_copy(update={"broker_url": url}))
        for connection in (app.connection_for_write(), app.connection_for_read().clone()):
            with pytest.raises(OperationalError):  # refused by us, or by what is no RabbitMQ
                connection.ensure_connection(max_retries=2, interval_start=0, interval_step=0)
        return proxy.heard != b""

    assert says_something(secured[1], certificate)
    assert not says_something(misnamed[1], certificate_of_another)


@pytest.mark.parametrize(
    "urls",
    [
        "amqp://{down};amqps://{up}",
        "amqps://{down}?ssl_cert_reqs=none;amqps://{up}",
        "amqps://{down};amqps://{up}?ssl_cert_reqs=none",
        "amqps://{down};amqps://{up}?ssl_ca_certs=/etc/other.pem",
        "amqps://{up}?ssl=1",
        "amqps://{up}?ssl_certreqs=none",
        "amqp://{up}?ssl=true",
        "amqp://{up}?%73sl=true",
        "amqp://{up}?ssl_cert_reqs=required",
        "pyamqp://{up}?ssl=1",
    ],
)
def test_nothing_is_said_to_a_rabbitmq_that_only_some_of_the_urls_or_options_would_verify(
    misnamed: tuple[Settings, Proxy],
    certificate_of_another: Path,
    monkeypatch: pytest.MonkeyPatch,
    urls: str,
) -> None:
    settings, proxy = misnamed
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate_of_another))
    monkeypatch.setattr("blipq.transport.broker.PUBLISH_TIMEOUT_S", 8.0)
    places = {"down": "user:hush@127.0.0.1:1//", "up": f"user:hush@127.0.0.1:{proxy.port}//"}
    url = urls.format(**places)
    with pytest.raises(InvalidRequest, match="broker_url: ") as refused:
        checked(Settings, broker_url=url)
    assert "hush" not in str(refused.value)
    assert "\n" not in str(refused.value)
    broker = Broker(settings.model_copy(update={"broker_url": url}))  # checked by nobody yet
    assert not broker.publish(MESSAGE)
    broker.close()
    assert proxy.heard == b""


@pytest.fixture
def sentinel(
    tmp_path: Path, certificate: Path, own_redis: Settings
) -> Iterator[tuple[str, Proxy, Proxy]]:
    """A sentinel behind TLS whose master is behind TLS, too; what a URL names of it."""
    redis_port = int(own_redis.redis_url.rpartition(":")[2].partition("/")[0])
    master = Proxy(certificate, ("127.0.0.1", redis_port))
    port = free_port()
    config = tmp_path / "sentinel.conf"
    config.write_text(
        f"bind 127.0.0.1\nport {port}\ndir {tmp_path}\n"
        f"sentinel monitor mymaster 127.0.0.1 {redis_port} 1\n"
    )
    command = [redis_command(), str(config), "--sentinel"]
    service = Service("sentinel", command, log=tmp_path / "sentinel.log")
    service.start()
    asked = Proxy(certificate, ("127.0.0.1", port))
    with redis.Redis(port=port) as plain:
        wait_until(lambda: _knows_the_master(plain), "the sentinel")
    yield f"sentinels://127.0.0.1:{asked.port}/0", asked, master
    service.stop()
    asked.close()
    master.close()


def _knows_the_master(plain: "redis.Redis") -> bool:
    with suppress(redis.RedisError):
        return bool(plain.execute_command("SENTINEL", "get-master-addr-by-name", "mymaster"))
    return False


def test_sentinels_over_tls_are_verified_by_both_sides(
    sentinel: tuple[str, Proxy, Proxy], certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, asked, master = sentinel
    # The sentinel names the plain port; the servers speak TLS on that of the proxy.
    found = Sentinel.discover_master
    monkeypatch.setattr(
        Sentinel, "discover_master", lambda self, name: (found(self, name)[0], master.port)
    )
    settings = Settings(redis_url=f"{url}?ssl_ca_certs={certificate}")
    with Client(settings) as client:
        assert client.caption(IMAGE).status() == "queued"
        wait_until(lambda: client.ledger.redis.llen("blipq.default.normal") == 1, "the message")
    heard = len(asked.heard), len(master.heard)
    assert all(heard)
    with Client(redis_url=url, timeout_s=1) as client, pytest.raises(QueueUnavailable):
        client.caption(IMAGE)
    assert not Broker(Settings(redis_url=url)).publish(MESSAGE)
    assert (len(asked.heard), len(master.heard)) == heard, "nothing was said to nobody known"
