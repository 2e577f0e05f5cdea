"""Hears when jobs end: one subscription per client, as a task of its event loop.

Like ``notifier``, it only wakes those who wait.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Any

import redis
import redis.asyncio

from blipq.notifier import Subscribers


class AsyncInbox:
    """What one who waits was told: ids of jobs that have ended."""

    def __init__(self) -> None:
        self.channels: set[str] = set()
        self._told: list[str] = []
        self._wake: asyncio.Future[None] | None = None

    def tell(self, id: str) -> None:
        """A job has ended."""
        self._told.append(id)
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    async def take(self, timeout: float) -> list[str]:
        """What was told since, waiting up to ``timeout`` seconds for the first."""
        if timeout > 0 and not self._told:
            self._wake = asyncio.get_running_loop().create_future()
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await self._wake
        told, self._told = self._told, []
        return told


class AsyncNotifier:
    """A task that listens on this client's channel, and on those of other clients' jobs."""

    def __init__(self, connect: Callable[[], "redis.asyncio.Redis"], own_channel: str) -> None:
        self._connect = connect
        self._subscribers = Subscribers(own_channel)
        self._closed = False
        self._task: asyncio.Task[None] | None = None
        self._pubsub: Any = None
        self._leaving = False

    def __len__(self) -> int:
        """How many jobs are waited for."""
        return len(self._subscribers)

    @asynccontextmanager
    async def watch(self, ids: Iterable[str]) -> AsyncIterator[AsyncInbox]:
        """An inbox that is told when one of the jobs has ended."""
        ids, inbox = list(ids), AsyncInbox()
        self._subscribers.add(ids, inbox)
        self._start()
        try:
            yield inbox
        finally:
            self._subscribers.remove(ids, inbox)
            await self._send("unsubscribe", self._subscribers.leave(inbox))

    async def listen(self, inbox: AsyncInbox, channels: Iterable[str]) -> None:
        """Jobs of other clients are told on their own channels."""
        await self._send("subscribe", self._subscribers.listen(channels, inbox))

    def tell(self, id: str) -> None:
        """Wakes those who wait for a job."""
        self._subscribers.tell(id)

    async def aclose(self) -> None:
        """Stops listening."""
        self._closed = True
        while self._task is not None and not self._task.done():
            if not self._leaving:  # else it would be kept from closing its connection
                self._task.cancel()  # wait_for of Python 3.11 can lose it: once more, then
            await asyncio.wait([self._task], timeout=0.5)

    async def _send(self, command: str, channels: list[str]) -> None:
        """To the open subscription; one that opens later takes all channels at once."""
        if channels and self._pubsub is not None:
            with suppress(redis.RedisError, OSError):
                await getattr(self._pubsub, command)(*channels)

    def _start(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="blipq-notifier")

    async def _run(self) -> None:
        while not self._closed:
            with suppress(redis.RedisError, OSError):
                await self._listen()
            if not self._closed:
                await asyncio.sleep(0.5)

    async def _listen(self) -> None:
        async with (
            self._connect() as client,
            client.pubsub(ignore_subscribe_messages=True) as pubsub,
        ):
            self._leaving = False
            try:
                await pubsub.subscribe(*self._subscribers.channels)
                self._pubsub = pubsub
                while not self._closed:
                    # The timeout lets the connection's health be checked.
                    message = await pubsub.get_message(timeout=5.0)
                    if message is not None:
                        self.tell(message["data"])
            finally:
                self._pubsub, self._leaving = None, True
