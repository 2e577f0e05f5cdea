"""Hears when jobs end: one subscription per client, on a thread of its own.

It only wakes those who wait; the outcome is always read from the ledger. A waiter knows since when
the subscription lives, reads the ledger at once when it is made again, and now and then anyway: a
lost notification, a dropped connection or a restarted Redis delay the answer by one poll, no more.
"""

import logging
import selectors
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from typing import Any

import redis

from blipq.redaction import redacted

log = logging.getLogger(__name__)

#: Between two attempts at a subscription, and the longest until the wanted channels are read again.
PAUSE_S = 0.5
#: So many attempts in a row fail before it is an outage; and the least time between two warnings.
OUTAGE_FAILURES, SILENT_S = 3, 60.0
#: Wakes a waiter without the id of a job.
NO_JOB = ""


class Inbox:
    """The ids of ended jobs, for one waiter."""

    def __init__(self) -> None:
        self.channels: set[str] = set()
        self._ids: SimpleQueue[str] = SimpleQueue()

    def put(self, id: str) -> None:
        """A job has ended."""
        self._ids.put(id)

    def take(self, timeout: float) -> list[str]:
        """The ids put since, waiting up to ``timeout`` seconds for the first."""
        ids = []
        with suppress(Empty):
            ids.append(self._ids.get(timeout=timeout) if timeout > 0 else self._ids.get_nowait())
            while True:
                ids.append(self._ids.get_nowait())
        return [id for id in ids if id != NO_JOB]


class Subscribers:
    """Who waits for which jobs, and on how many behalves a channel is listened to."""

    def __init__(self, own_channel: str) -> None:
        self.channels = Counter({own_channel: 1})
        self._own_channel = own_channel
        self._waiting: dict[str, list[Any]] = {}
        self._subscribed_since: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, ids: Iterable[str], inbox: Any) -> None:
        for id in ids:
            self._waiting.setdefault(id, []).append(inbox)

    def remove(self, ids: Iterable[str], inbox: Any) -> None:
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
        for channel in left:
            self._subscribed_since.pop(channel, None)
        return left

    def confirm(self, channel: str) -> None:
        """A channel is subscribed from now on."""
        if (
            channel in self._subscribed_since
        ):  # redis-py has connected again: something may be missed
            self._wake()
        if self.channels[channel]:
            self._subscribed_since[channel] = time.monotonic()

    def silence(self) -> None:
        """The subscription has ended."""
        if self._subscribed_since:
            self._subscribed_since.clear()
            self._wake()

    def _wake(self) -> None:
        """Has all waiters read since when their channels are subscribed."""
        inboxes = {id(each): each for waiting in self._waiting.values() for each in waiting}
        for inbox in inboxes.values():
            inbox.put(NO_JOB)

    def subscribed_since(self, inbox: Any) -> float | None:
        """Since when an inbox misses no end of a job (monotonic); None while it may."""
        channels = (self._own_channel, *inbox.channels)
        if not all(channel in self._subscribed_since for channel in channels):
            return None
        return max(self._subscribed_since[channel] for channel in channels)

    def put(self, id: str) -> None:
        """Wakes all who wait for a job."""
        for inbox in self._waiting.get(id, ()):
            inbox.put(id)


class Outage:
    """Logs once that there are no notifications, and once that they are back.

    A connection that is dropped and opened again is no outage.
    """

    def __init__(self) -> None:
        self._failures = 0
        self._logged = False
        self._silent_until = 0.0

    def failed(self, error: Exception) -> None:
        """A subscription ended, or could not be made."""
        self._failures += 1
        expected = isinstance(error, (redis.RedisError, OSError))
        why = redacted(f"{type(error).__name__}: {error}")
        if self._logged or (expected and self._failures < OUTAGE_FAILURES) or self._is_silent():
            log.debug("the subscription is opened again: %s", why)
            return
        self._logged, self._silent_until = True, time.monotonic() + SILENT_S
        shown = None if expected else error
        log.warning("no notifications, jobs are polled instead: %s", why, exc_info=shown)

    def over(self) -> None:
        """A subscription was confirmed."""
        self._failures = 0
        if self._logged:
            self._logged = False
            log.info("notifications are received again")

    def _is_silent(self) -> bool:
        return time.monotonic() < self._silent_until


class Notifier:
    """A thread that listens on this client's channel, and on those of other clients' jobs.

    The subscription is that thread's alone: while redis-py connects again, a second thread's
    ``subscribe`` would meet a connection that is half made, and read answers that are not its own.
    Others note the channels that they need, and wake it.
    """

    def __init__(self, connect: Callable[[], "redis.Redis"], own_channel: str) -> None:
        self._connect = connect
        # Of the subscribers and the thread: waiters come and go while it notifies others.
        self._lock = threading.Lock()
        self._subscribers = Subscribers(own_channel)
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._wake: socket.socket | None = None
        self._outage = Outage()

    def __len__(self) -> int:
        """How many jobs are waited for."""
        return len(self._subscribers)

    @contextmanager
    def watch(self, ids: Iterable[str], inbox: Inbox | None = None) -> Iterator[Inbox]:
        """An inbox that gets the id of each of the jobs that ends."""
        ids, inbox = list(ids), inbox or Inbox()
        with self._lock:
            self._subscribers.add(ids, inbox)
        try:
            self._start()
            yield inbox
        finally:
            with self._lock:
                self._subscribers.remove(ids, inbox)
                if self._subscribers.leave(inbox):
                    self._wake_up()

    def listen(self, inbox: Inbox, channels: Iterable[str]) -> None:
        """Jobs of other clients are notified on those clients' channels."""
        with self._lock:
            if self._subscribers.listen(channels, inbox):
                self._wake_up()

    def subscribed_since(self, inbox: Inbox) -> float | None:
        """Since when an inbox misses no end of a job (monotonic); None while it may."""
        with self._lock:
            return self._subscribers.subscribed_since(inbox)

    def put(self, id: str) -> None:
        """Wakes those who wait for a job."""
        with self._lock:
            self._subscribers.put(id)

    def close(self) -> None:
        self._closed.set()  # before it is woken, or it would go back to waiting
        with self._lock:
            self._wake_up()
        if self._thread is not None:
            self._thread.join(timeout=2)

    def _wake_up(self) -> None:
        """The thread reads the wanted channels. It does so every half second anyway."""
        if self._wake is not None:
            with suppress(OSError):  # full of wake-ups, or the thread has just left
                self._wake.send(b"!")

    def _start(self) -> None:
        """Starts the thread. Where none can be started, waiters poll."""
        with self._lock:
            if self._thread is not None:
                return
            thread = threading.Thread(target=self._run, name="blipq-notifier", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # too many threads: the next who waits tries again
                log.warning("no notifications, jobs are polled instead: %s", error)
            else:
                self._thread = thread

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                self._listen()
            except Exception as error:  # whatever it is, who waits must hear of jobs again
                self._outage.failed(error)
            self._closed.wait(PAUSE_S)

    def _listen(self) -> None:
        client = self._connect()
        pubsub: Any = client.pubsub()  # type: ignore[no-untyped-call]
        wake, woken = socket.socketpair()
        wake.setblocking(False)
        woken.setblocking(False)
        try:
            with self._lock:
                self._wake = wake
            while not self._closed.is_set():
                self._follow(pubsub)
                self._take_all(pubsub)
                _wait_for(pubsub.connection, woken)
        finally:
            with self._lock:
                self._wake = None
                self._subscribers.silence()
            wake.close()
            woken.close()
            pubsub.close()
            client.close()

    def _follow(self, pubsub: Any) -> None:
        """Subscribes to what is wanted now, and to nothing else."""
        with self._lock:
            wanted = set(self._subscribers.channels)
        subscribed = set(pubsub.channels) - set(pubsub.pending_unsubscribe_channels)
        if fresh := wanted - subscribed:
            pubsub.subscribe(*fresh)
        if left := subscribed - wanted:
            pubsub.unsubscribe(*left)

    def _take_all(self, pubsub: Any) -> None:
        """What has come. Answers to subscriptions are messages here: None means all is read."""
        while (message := pubsub.get_message(timeout=0)) is not None:
            if message["type"] == "message":
                self.put(message["data"])
            elif message["type"] == "subscribe":
                with self._lock:
                    self._subscribers.confirm(message["channel"])
                self._outage.over()


def _wait_for(connection: Any, woken: socket.socket) -> None:
    """Until there is something to read or somebody calls, for half a second at most."""
    with selectors.DefaultSelector() as selector:
        selector.register(connection._sock, selectors.EVENT_READ)
        selector.register(woken, selectors.EVENT_READ)
        selector.select(PAUSE_S)
    with suppress(BlockingIOError):
        woken.recv(4096)
