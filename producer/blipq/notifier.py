"""Hears when jobs end: one subscription per client, on a thread of its own.

It only wakes those who wait; what a job came to is always read from the ledger. Whoever waits also
looks now and then, so a lost notification, a dropped connection or a restarted Redis delay the
answer by a look, no more.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from typing import Any

import redis


class Inbox:
    """What one who waits was told: ids of jobs that have ended."""

    def __init__(self) -> None:
        self.channels: set[str] = set()
        self._told: SimpleQueue[str] = SimpleQueue()

    def tell(self, id: str) -> None:
        """A job has ended."""
        self._told.put(id)

    def take(self, timeout: float) -> list[str]:
        """What was told since, waiting up to ``timeout`` seconds for the first."""
        told = []
        with suppress(Empty):
            told.append(self._told.get(timeout=timeout) if timeout > 0 else self._told.get_nowait())
            while True:
                told.append(self._told.get_nowait())
        return told


class Subscribers:
    """Who waits for which jobs, and on how many behalves a channel is listened to."""

    def __init__(self, own_channel: str) -> None:
        self.channels = Counter({own_channel: 1})
        self._waiting: dict[str, list[Any]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, ids: Iterable[str], inbox: Any) -> None:
        """Remembers one who waits."""
        for id in ids:
            self._waiting.setdefault(id, []).append(inbox)

    def remove(self, ids: Iterable[str], inbox: Any) -> None:
        """Forgets one who waits."""
        for id in ids:
            self._waiting[id].remove(inbox)
            if not self._waiting[id]:
                del self._waiting[id]

    def listen(self, channels: Iterable[str], inbox: Any) -> list[str]:
        """Listens on channels of other clients for somebody; those that nobody listened on yet."""
        wanted = set(channels) - inbox.channels
        inbox.channels |= wanted
        fresh = [channel for channel in wanted if not self.channels[channel]]
        self.channels.update(wanted)
        return fresh

    def leave(self, inbox: Any) -> list[str]:
        """Stops listening for somebody; the channels that nobody listens on any more."""
        self.channels.subtract(inbox.channels)
        left = [channel for channel in inbox.channels if not self.channels[channel]]
        self.channels = +self.channels
        return left

    def tell(self, id: str) -> None:
        """Tells all who wait for a job."""
        for inbox in self._waiting.get(id, ()):
            inbox.tell(id)


class Notifier:
    """A thread that listens on this client's channel, and on those of other clients' jobs."""

    def __init__(self, connect: Callable[[], "redis.Redis"], own_channel: str) -> None:
        self._connect = connect
        self._own_channel = own_channel
        self._lock = threading.Lock()
        self._subscribers = Subscribers(own_channel)
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._pubsub: Any = None

    def __len__(self) -> int:
        """How many jobs are waited for."""
        return len(self._subscribers)

    @contextmanager
    def watch(self, ids: Iterable[str]) -> Iterator[Inbox]:
        """An inbox that is told when one of the jobs has ended."""
        ids, inbox = list(ids), Inbox()
        with self._lock:
            self._subscribers.add(ids, inbox)
            self._start()
        try:
            yield inbox
        finally:
            with self._lock:
                self._subscribers.remove(ids, inbox)
                self._send("unsubscribe", self._subscribers.leave(inbox))

    def listen(self, inbox: Inbox, channels: Iterable[str]) -> None:
        """Jobs of other clients are told on their own channels."""
        with self._lock:
            self._send("subscribe", self._subscribers.listen(channels, inbox))

    def tell(self, id: str) -> None:
        """Wakes those who wait for a job."""
        with self._lock:
            self._subscribers.tell(id)

    def close(self) -> None:
        """Stops listening."""
        self._closed.set()
        with self._lock:
            self._send("unsubscribe", [self._own_channel])  # the answer wakes the thread at once
        if self._thread is not None:
            self._thread.join(timeout=2)

    def _send(self, command: str, channels: list[str]) -> None:
        """To the open subscription; one that opens later takes all channels at once."""
        if channels and self._pubsub is not None:
            with suppress(redis.RedisError, OSError):
                getattr(self._pubsub, command)(*channels)

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="blipq-notifier", daemon=True)
            self._thread.start()

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
                pubsub.subscribe(*self._subscribers.channels)
                self._pubsub = pubsub
            while not self._closed.is_set():
                message = pubsub.get_message(timeout=0.5)
                if message is not None:
                    self.tell(message["data"])
        finally:
            with self._lock:
                self._pubsub = None
            pubsub.close()
            client.close()
