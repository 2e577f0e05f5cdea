"""Broker, storage and notifications without services."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future

from blipq.ledger.codec import Message, Prepared
from blipq.s3.storage import Storage
from blipq.settings import Settings
from blipq.transport.async_notifications import AsyncNotifier
from blipq.transport.broker import Broker
from blipq.transport.notifications import Notifier


class InMemoryBroker(Broker):
    """Delivers each message as it is published."""

    def __init__(self, deliver: Callable[[list[Message]], None], settings: Settings) -> None:
        super().__init__(settings)
        self._deliver = deliver

    def with_message(self, job: Prepared) -> Prepared:
        """The job alone: it is delivered when it is recorded."""
        return job

    def send(self, messages: list[Message]) -> "Future[None]":
        """Delivers messages before it returns."""
        self._deliver(messages)
        sent: Future[None] = Future()
        sent.set_result(None)
        return sent

    def publish_all(self, messages: list[Message]) -> bool:
        """Delivers messages before it returns; always in time."""
        self._deliver(messages)
        return True


class InMemoryStorage(Storage):
    """S3 as a dictionary."""

    def __init__(self, objects: dict[str, bytes], settings: Settings) -> None:
        super().__init__(settings)
        self._objects = objects

    def put(self, uri: str, data: bytes, *, content_type: str) -> None:
        """Writes an object."""
        self._objects[uri] = data

    def read(self, uri: str) -> bytes:
        """An object's bytes."""
        return self._objects[uri]

    def delete(self, uri: str) -> None:
        """Deletes an object, if it is there."""
        self._objects.pop(uri, None)

    def _put_once(self, bucket: str, key: str, data: bytes, content_type: str) -> None:
        self._objects.setdefault(f"s3://{bucket}/{key}", data)


class InMemoryNotifier(Notifier):
    """Notified by the fake, not by a subscription."""

    def _start(self) -> None:
        pass


class InMemoryAsyncNotifier(AsyncNotifier):
    """Notified by the fake, from any thread."""

    def _start(self) -> None:
        self._loop = asyncio.get_running_loop()

    def put(self, id: str) -> None:
        """Notifies of a job that has ended."""
        if len(self):
            self._loop.call_soon_threadsafe(super().put, id)
