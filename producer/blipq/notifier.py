"""One subscription per client process that says which jobs have ended.

It only saves time: whoever waits also reads the record now and then, so a lost notification, a
dropped connection or a restarted Redis delay the answer by a poll, no more.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import redis

from blipq.errors import QueueUnavailable


class Notifier:
    """A thread that listens on this client's channel, and on those of other clients' jobs."""

    def __init__(self, connect: Callable[[], "redis.Redis"], own_channel: str) -> None:
        self._connect = connect
        self._own_channel = own_channel
        self._waiting: dict[str, list[threading.Event]] = {}
        self._channels = {own_channel}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._pubsub: Any = None

    @contextmanager
    def watch(self, id: str, channel: Callable[[], str | None]) -> Iterator[threading.Event]:
        """An event that is set when the job is told to have ended."""
        told = threading.Event()
        with self._lock:
            self._waiting.setdefault(id, []).append(told)
            self._start()
        with suppress(QueueUnavailable, redis.RedisError):
            self._listen_to(channel())
        try:
            yield told
        finally:
            with self._lock:
                self._waiting[id].remove(told)
                if not self._waiting[id]:
                    del self._waiting[id]

    def close(self) -> None:
        """Stops listening."""
        self._closed.set()
        # The answer to this wakes the thread at once.
        with self._lock, suppress(redis.RedisError, OSError):
            if self._pubsub is not None:
                self._pubsub.unsubscribe()
        if self._thread is not None:
            self._thread.join(timeout=2)

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="blipq-notifier", daemon=True)
            self._thread.start()

    def _listen_to(self, channel: str | None) -> None:
        """Jobs of other clients are told on their own channel."""
        with self._lock:
            known = channel is None or channel in self._channels
            if not known and channel is not None:
                self._channels.add(channel)
                if self._pubsub is not None:
                    self._pubsub.subscribe(channel)

    def _run(self) -> None:
        while not self._closed.is_set():
            with suppress(redis.RedisError, OSError):
                self._listen()
            self._closed.wait(0.5)

    def _listen(self) -> None:
        client = self._connect()
        pubsub: Any = client.pubsub(ignore_subscribe_messages=True)  # type: ignore[no-untyped-call]
        try:
            with self._lock:
                pubsub.subscribe(*self._channels)
                self._pubsub = pubsub
            while not self._closed.is_set():
                message = pubsub.get_message(timeout=0.5)
                if message is not None:
                    self._tell(message["data"])
        finally:
            with self._lock:
                self._pubsub = None
            pubsub.close()
            client.close()

    def _tell(self, id: str) -> None:
        with self._lock:
            for told in self._waiting.get(id, ()):
                told.set()
