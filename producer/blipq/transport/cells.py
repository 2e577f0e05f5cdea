"""The brokers of several cells, and the ends of jobs in them, for one client."""

import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, InvalidStateError
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from typing import Any

from blipq.ledger.codec import Message, Prepared
from blipq.redis.cells import Cells
from blipq.settings import Settings
from blipq.transport.async_notifications import AsyncInbox, AsyncNotifier
from blipq.transport.broker import Broker
from blipq.transport.notifications import Inbox, Notifier


class CellsBroker(Broker):
    """Publishes each message in the cell of its job."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._cells = Cells.of(settings.cells, settings.cell_lists)
        self._brokers = {name: Broker(settings.in_cell(name)) for name in self._cells.names}

    def with_message(self, job: Prepared) -> Prepared:
        """A job that the cell which records it is to publish, where no cell has another broker."""
        return job if self.settings.cell_brokers else replace(job, publishes=True)

    def publish_all(self, messages: list[Message]) -> bool:
        """Publishes many, cell by cell; False if a broker did not take its own in time."""
        if all(message.published for message in messages):
            return True
        groups = self._groups(messages)
        taken = [self._brokers[cell].publish_all(group) for cell, group in groups.items()]
        return all(taken)

    def send(self, messages: list[Message]) -> "Future[None]":
        """Hands messages to the brokers' threads; the future is done when all have theirs."""
        groups = self._groups(message for message in messages if not message.published)
        sent: Future[None] = Future()
        if not groups:
            sent.set_result(None)
        left = set(groups)
        lock = threading.Lock()  # the brokers' threads end in any order, two of them at once

        def done(cell: str, error: BaseException | None) -> None:
            with lock, suppress(InvalidStateError):  # it has failed before, or nobody waits
                left.discard(cell)
                if error is not None:
                    sent.set_exception(error)
                elif not left:
                    sent.set_result(None)

        for cell, group in groups.items():
            part = self._brokers[cell].send(group)
            part.add_done_callback(lambda part, cell=cell: done(cell, part.exception()))  # type: ignore[misc]
        return sent

    def _groups(self, messages: Iterable[Message]) -> dict[str, list[Message]]:
        groups: dict[str, list[Message]] = {}
        for message in messages:
            # Of a job that an earlier try recorded it may be a guess: the reconciler publishes it.
            cell = message.cell or self._cells.likely(message.id)[0]
            if cell in self._brokers:
                groups.setdefault(cell, []).append(message)
        return groups

    def close(self) -> None:
        """Closes the connections."""
        for each in self._brokers.values():
            each.close()


def _by_cell(cells: Cells, ids: Iterable[str]) -> dict[str, list[str]]:
    """In which cells to listen for which jobs: in all for one whose id has none."""
    found: dict[str, list[str]] = {}
    for id in ids:
        for cell in cells.likely(id):
            if cell in cells.names:
                found.setdefault(cell, []).append(id)
    return found


class _Part(Inbox):
    """A waiter's inbox in one cell: it has channels of its own, and passes ids on."""

    def __init__(self, whole: "Inbox | AsyncInbox") -> None:
        super().__init__()
        self.put = whole.put  # type: ignore[method-assign]


class CellsInbox(Inbox):
    """The ids of ended jobs of several cells, for one waiter."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: dict[str, Any] = {}


class AsyncCellsInbox(AsyncInbox):
    """The same in an event loop."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: dict[str, Any] = {}


def _subscribed_since(notifiers: Mapping[str, Any], inbox: Any) -> float | None:
    times = [notifiers[cell].subscribed_since(part) for cell, part in inbox.parts.items()]
    return None if None in times else max(times, default=None)


class CellsNotifier(Notifier):
    """A notifier for each cell in which somebody waits for a job."""

    def __init__(self, cells: Cells, make: Callable[[str], Notifier]) -> None:
        self._cells = cells
        self._make = make
        self._notifiers: dict[str, Notifier] = {}
        self._making = threading.Lock()  # a second notifier of a cell would stay open unseen

    def __len__(self) -> int:
        return sum(map(len, list(self._notifiers.values())))

    def _of(self, cell: str) -> Notifier:
        with self._making:
            if cell not in self._notifiers:
                self._notifiers[cell] = self._make(cell)
            return self._notifiers[cell]

    @contextmanager
    def watch(self, ids: Iterable[str], inbox: Inbox | None = None) -> Iterator[Inbox]:
        """An inbox that gets the id of each of the jobs that ends."""
        whole = CellsInbox()
        with ExitStack() as stack:
            for cell, own in _by_cell(self._cells, ids).items():
                part = _Part(whole)
                whole.parts[cell] = stack.enter_context(self._of(cell).watch(own, part))
            yield whole

    def listen(self, inbox: Inbox, channels: Iterable[str]) -> None:
        """Jobs of other clients are notified on those clients' channels, in any of the cells."""
        assert isinstance(inbox, CellsInbox), "it is one of watch"
        channels = list(channels)
        for cell, part in inbox.parts.items():
            self._of(cell).listen(part, channels)

    def subscribed_since(self, inbox: Inbox) -> float | None:
        """Since when an inbox misses no end of a job (monotonic); None while it may."""
        return _subscribed_since(self._notifiers, inbox)

    def put(self, id: str) -> None:
        """Wakes those who wait for a job."""
        for each in list(self._notifiers.values()):
            each.put(id)

    def close(self) -> None:
        for each in list(self._notifiers.values()):
            each.close()


class AsyncCellsNotifier(AsyncNotifier):
    """The same for an event loop."""

    def __init__(self, cells: Cells, make: Callable[[str], AsyncNotifier]) -> None:
        self._cells = cells
        self._make = make
        self._notifiers: dict[str, AsyncNotifier] = {}

    def __len__(self) -> int:
        return sum(map(len, self._notifiers.values()))

    def _of(self, cell: str) -> AsyncNotifier:
        if cell not in self._notifiers:
            self._notifiers[cell] = self._make(cell)
        return self._notifiers[cell]

    @asynccontextmanager
    async def watch(
        self, ids: Iterable[str], inbox: AsyncInbox | None = None
    ) -> AsyncIterator[AsyncInbox]:
        """An inbox that gets the id of each of the jobs that ends."""
        whole = AsyncCellsInbox()
        async with AsyncExitStack() as stack:
            for cell, own in _by_cell(self._cells, ids).items():
                part: Any = _Part(whole)
                watching = self._of(cell).watch(own, part)
                whole.parts[cell] = await stack.enter_async_context(watching)
            yield whole

    def listen(self, inbox: AsyncInbox, channels: Iterable[str]) -> None:
        """Jobs of other clients are notified on those clients' channels, in any of the cells."""
        assert isinstance(inbox, AsyncCellsInbox), "it is one of watch"
        channels = list(channels)
        for cell, part in inbox.parts.items():
            self._of(cell).listen(part, channels)

    def subscribed_since(self, inbox: AsyncInbox) -> float | None:
        """Since when an inbox misses no end of a job (monotonic); None while it may."""
        return _subscribed_since(self._notifiers, inbox)

    def put(self, id: str) -> None:
        """Wakes those who wait for a job."""
        for each in self._notifiers.values():
            each.put(id)

    async def aclose(self) -> None:
        for each in self._notifiers.values():
            await each.aclose()
