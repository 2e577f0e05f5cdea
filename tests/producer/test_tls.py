"""A Redis behind TLS: the ledger, the messages and the notifications, of both clients.

The server in the local stack's wheel has no TLS, so a proxy in front of it ends the encryption.
"""

import os
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from blipq import Client, QueueUnavailable, Settings
from blipq.ledger import Claim, Ledger, connect
from blocking import BlockingClient

IMAGE = "s3://uploads/cat.jpg"
RESULT = '{"kind": "caption", "captions": [{"text": "a cat"}]}'


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for this machine and its key, in one file."""
    if shutil.which("openssl") is None:
        assert "CI" not in os.environ, "CI needs openssl"
        pytest.skip("openssl is not installed here")
    folder = tmp_path_factory.mktemp("tls")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
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
            _pump(inside, outside)
            outside.shutdown(socket.SHUT_RDWR)
            back.join()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)


@pytest.fixture
def secured(apart: Settings, certificate: Path) -> Iterator[tuple[Settings, Proxy]]:
    parts = urlsplit(apart.redis_url)
    proxy = Proxy(certificate, (str(parts.hostname), int(parts.port or 6379)))
    query = f"ssl_cert_reqs=required&ssl_ca_certs={certificate}"
    user = parts.netloc.rpartition("@")[0]
    url = f"rediss://{user}@127.0.0.1:{proxy.port}{parts.path}?{query}"
    yield apart.model_copy(update={"redis_url": url}), proxy
    proxy.close()


@pytest.mark.parametrize("opened", [Client, BlockingClient])
def test_a_job_goes_through_an_encrypted_redis(
    secured: tuple[Settings, Proxy], apart: Settings, opened: Callable[..., Any]
) -> None:
    settings, proxy = secured
    with opened(settings) as client, connect(apart) as plain:
        job = client.caption(IMAGE)
        assert plain.llen("blipq.default.normal") == 1, "the message went through, too"
        ledger = Ledger(plain, apart)
        claim = ledger.claim(job.id, "w1")
        assert isinstance(claim, Claim)
        ending = threading.Timer(0.3, ledger.succeed, (claim, RESULT, "{}"))
        ending.start()
        assert job.result(timeout=20).text == "a cat"
        ending.join()
    assert proxy.taken >= 3, "ledger, broker and notifier"


def test_a_certificate_of_nobody_known_is_refused(secured: tuple[Settings, Proxy]) -> None:
    settings, proxy = secured
    unknown = settings.model_copy(update={"redis_url": settings.redis_url.partition("?")[0]})
    with Client(unknown) as client, pytest.raises(QueueUnavailable, match="certificate"):
        client.caption(IMAGE)
    assert proxy.taken == 0
