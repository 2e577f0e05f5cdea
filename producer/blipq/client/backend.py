"""What clients work with: the ledger, the broker, S3 and the notifications, of one process."""

import os
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from blipq.ledger.async_producer import AsyncProducerLedger
from blipq.ledger.cells.async_producer import AsyncCellsLedger
from blipq.ledger.cells.producer import CellsLedger
from blipq.ledger.connection import connect, connect_async
from blipq.ledger.keys import ended_channel
from blipq.ledger.producer import ProducerLedger
from blipq.ledger.protocols import AsyncProducer, Producer
from blipq.s3.storage import Storage
from blipq.settings import Settings
from blipq.transport.async_notifications import AsyncNotifier
from blipq.transport.broker import Broker
from blipq.transport.cells import AsyncCellsNotifier, CellsBroker, CellsNotifier
from blipq.transport.notifications import Notifier

T = TypeVar("T")


class Services:
    """The services of one client in one process."""

    def __init__(
        self, ledger: Producer, broker: Broker, storage: Storage, notifier: Notifier
    ) -> None:
        self.ledger = ledger
        self.broker = broker
        self.storage = storage
        self.notifier = notifier

    def close(self) -> None:
        """Closes the connections."""
        self.notifier.close()
        self.broker.close()
        self.ledger.close()


class AsyncServices:
    """The services of one client in one event loop."""

    def __init__(
        self, ledger: AsyncProducer, broker: Broker, storage: Storage, notifier: AsyncNotifier
    ) -> None:
        self.ledger = ledger
        self.broker = broker
        self.storage = storage
        self.notifier = notifier

    async def aclose(self) -> None:
        """Closes the connections."""
        await self.notifier.aclose()
        self.broker.close()
        await self.ledger.aclose()


class Backend:
    """Makes the services of a client: those that its settings name."""

    def services(self, settings: Settings, client: str) -> Services:
        """The services of a client. Connects to nothing yet."""
        if settings.is_fleet:
            return _of_cells(settings, client)
        return Services(
            ProducerLedger(connect(settings), settings),
            Broker(settings),
            Storage(settings),
            Notifier(lambda: connect(settings), ended_channel(client)),
        )

    def async_services(self, settings: Settings, client: str) -> AsyncServices:
        """The services of an asynchronous client. Connects to nothing yet."""
        if settings.is_fleet:
            return _async_of_cells(settings, client)
        return AsyncServices(
            AsyncProducerLedger(connect_async(settings), settings),
            Broker(settings),
            Storage(settings),
            AsyncNotifier(lambda: connect_async(settings, reconnects=False), ended_channel(client)),
        )


def _of_cells(settings: Settings, client: str) -> Services:
    """The services of a client of several cells."""
    ledger, channel = CellsLedger(settings), ended_channel(client)

    def notifier(cell: str) -> Notifier:
        return Notifier(lambda: connect(settings.in_cell(cell)), channel)

    return Services(
        ledger,
        CellsBroker(settings),
        Storage(settings),
        CellsNotifier(ledger.fleet.cells, notifier),
    )


def _async_of_cells(settings: Settings, client: str) -> AsyncServices:
    ledger, channel = AsyncCellsLedger(settings), ended_channel(client)

    def notifier(cell: str) -> AsyncNotifier:
        own = settings.in_cell(cell)
        return AsyncNotifier(lambda: connect_async(own, reconnects=False), channel)

    return AsyncServices(
        ledger,
        CellsBroker(settings),
        Storage(settings),
        AsyncCellsNotifier(ledger.fleet.cells, notifier),
    )


class PerProcess(Generic[T]):
    """Something that a forked child must make anew: neither threads nor sockets survive a fork.

    What the parent made is kept, untouched: to let it go would close it, with locks that nobody
    in the child would ever release.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._made: dict[int, T] = {}
        self._locks: dict[int, threading.Lock] = {}

    def __call__(self) -> T:
        """What this process made, or makes now. Threads share it."""
        pid = os.getpid()
        if pid not in self._made:
            with self._locks.setdefault(pid, threading.Lock()):
                if pid not in self._made:
                    self._made[pid] = self._make()
        return self._made[pid]

    @property
    def made(self) -> T | None:
        """What this process made, if it did."""
        return self._made.get(os.getpid())
