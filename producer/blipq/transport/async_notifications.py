"""Hears when jobs end: one subscription per client, as a task of its event loop.

Like ``notifications``, it only wakes those who wait.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Any

import redis.asyncio

from blipq.transport.notifications import NO_JOB, PAUSE_S, Outage, Subscribers

CHECK_S = 5.0


class AsyncInbox:
    """The ids of ended jobs, for one waiter."""

    def __init__(self) -> None:
        self.channels: set[str] = set()
        self._ids: list[str] = []
        self._wake: asyncio.Future[None] | None = None

    def put(self, id: str) -> None:
        """A job has ended."""
        self._ids.append(id)
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    async def take(self, timeout: float) -> list[str]:
        """The ids put since, waiting up to ``timeout`` seconds for the first."""
        if timeout > 0 and not self._ids:
            self._wake = asyncio.get_running_loop().create_future()
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await self._wake
        ids, self._ids = self._ids, []
        return [id for id in ids if id != NO_JOB]


async def _end(connection: Any) -> None:
    """Waits until a subscription's connection is closed, which redis-py does not.

    Over TLS the server has to answer: a loop that ended before would leave the socket open.
    """
    if connection is None:
        return
    writer = connection._writer
    try:
        await connection.disconnect()
    except (redis.RedisError, OSError):  # no answer in time
        if writer is not None:
            writer.transport.abort()


class AsyncNotifier:
    """A task that listens on this client's channel, and on those of other clients' jobs.

    The subscription is that task's alone, as in ``Notifier``: others say what they want to hear,
    and interrupt its reading. Reading can be interrupted anywhere, making a connection cannot: so
    none is made again underneath, a lost one ends the subscription.
    """

    def __init__(self, connect: Callable[[], "redis.asyncio.Redis"], own_channel: str) -> None:
        self._connect = connect
        self._subscribers = Subscribers(own_channel)
        self._closed = False
        self._task: asyncio.Task[None] | None = None
        self._reading: asyncio.Timeout | None = None
        self._leaving = False
        self._outage = Outage()

    def __len__(self) -> int:
        """How many jobs are waited for."""
        return len(self._subscribers)

    @asynccontextmanager
    async def watch(
        self, ids: Iterable[str], inbox: AsyncInbox | None = None
    ) -> AsyncIterator[AsyncInbox]:
        """An inbox that gets the id of each of the jobs that ends."""
        ids, inbox = list(ids), inbox or AsyncInbox()
        self._subscribers.add(ids, inbox)
        self._start()
        try:
            yield inbox
        finally:
            self._subscribers.remove(ids, inbox)
            if self._subscribers.leave(inbox):
                self._wake_up()

    def listen(self, inbox: AsyncInbox, channels: Iterable[str]) -> None:
        """Jobs of other clients are notified on those clients' channels."""
        if self._subscribers.listen(channels, inbox):
            self._wake_up()

    def subscribed_since(self, inbox: AsyncInbox) -> float | None:
        """Since when an inbox misses no end of a job (monotonic); None while it may."""
        return self._subscribers.subscribed_since(inbox)

    def put(self, id: str) -> None:
        """Wakes those who wait for a job."""
        self._subscribers.put(id)

    async def aclose(self) -> None:
        self._closed = True
        while self._task is not None and not self._task.done():
            if not self._leaving:  # else it would be kept from closing its connection
                self._task.cancel()  # wait_for of Python 3.11 can lose it: once more, then
            await asyncio.wait([self._task], timeout=0.5)

    def _wake_up(self) -> None:
        """The task reads the wanted channels now; one that is not waiting will before it waits."""
        if self._reading is not None and not self._reading.expired():
            self._reading.reschedule(0)

    def _start(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="blipq-notifier")

    async def _run(self) -> None:
        while not self._closed:
            try:
                await self._listen()
            except Exception as error:  # whatever it is, who waits must hear of jobs again
                self._outage.failed(error)
            if not self._closed:
                await asyncio.sleep(PAUSE_S)

    async def _listen(self) -> None:
        async with self._connect() as client, client.pubsub() as pubsub:
            self._leaving = False
            try:
                while not self._closed:
                    await self._follow(pubsub)
                    message = await self._next(pubsub)
                    if message is None:
                        continue
                    if message["type"] == "message":
                        self.put(message["data"])
                    elif message["type"] == "subscribe":
                        self._subscribers.confirm(message["channel"])
                        self._outage.over()
            finally:
                self._subscribers.silence()
                self._leaving = True
                await _end(pubsub.connection)

    async def _follow(self, pubsub: Any) -> None:
        """Subscribes to what is wanted now, and to nothing else."""
        while True:
            wanted = set(self._subscribers.channels)
            subscribed = set(pubsub.channels) - set(pubsub.pending_unsubscribe_channels)
            if wanted == subscribed:
                return
            if fresh := wanted - subscribed:
                await pubsub.subscribe(*fresh)
            if left := subscribed - wanted:
                await pubsub.unsubscribe(*left)

    async def _next(self, pubsub: Any) -> Any:
        """The next message; None when somebody called, or after a while without any."""
        try:
            # The inner timeout lets the connection's health be checked.
            async with asyncio.timeout(None) as self._reading:
                return await pubsub.get_message(timeout=CHECK_S)
        except TimeoutError:
            return None
        finally:
            self._reading = None
