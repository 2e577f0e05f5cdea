"""A way to Redis on which answers can be lost: it does what it is told, and nobody hears of it."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit


class MutedRedis:
    """Passes on what is said. Who says ``lost`` hears nothing more on that connection."""

    def __init__(self, redis_url: str) -> None:
        parts = urlsplit(redis_url)
        self._target = str(parts.hostname), int(parts.port or 6379)
        self._listening = socket.create_server(("127.0.0.1", 0))
        port = self._listening.getsockname()[1]
        netloc = f"{parts.netloc.rpartition('@')[0]}@127.0.0.1:{port}"
        self.url = parts._replace(netloc=netloc).geturl()
        self.lost: bytes | None = None
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listening.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                inside, _ = self._listening.accept()
                threading.Thread(target=self._serve, args=(inside,), daemon=True).start()

    def _serve(self, inside: socket.socket) -> None:
        muted = threading.Event()
        with suppress(OSError), inside, socket.create_connection(self._target) as outside:
            answers = threading.Thread(
                target=self._answer, args=(outside, inside, muted), daemon=True
            )
            answers.start()
            while data := inside.recv(65536):
                if self.lost is not None and self.lost in data:
                    muted.set()  # before the server can answer
                outside.sendall(data)
            outside.shutdown(socket.SHUT_RDWR)
            answers.join(10)

    def _answer(
        self, outside: socket.socket, inside: socket.socket, muted: threading.Event
    ) -> None:
        with suppress(OSError):
            while data := outside.recv(65536):
                if not muted.is_set():
                    inside.sendall(data)


@contextmanager
def muted_redis(redis_url: str) -> Iterator[MutedRedis]:
    way = MutedRedis(redis_url)
    try:
        yield way
    finally:
        way.close()
