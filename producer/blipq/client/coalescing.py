"""Coalesces polls: while one round trip is under way, the ids of the next gather."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable

from blipq.client.waiting import MAX_POLLED
from blipq.errors import QueueUnavailable
from blipq.ledger.codec import Polled
from blipq.redis.cells import cell_of

Found = Polled | QueueUnavailable
_Request = tuple[list[str], "asyncio.Future[Found]"]


class PollsOfCells:
    """Coalesces polls of the same cells: one that does not answer holds up no poll of others.

    Polls of different sets of the cells named are kept apart: with one Redis there is one set.
    """

    def __init__(self, poll: Callable[[list[str]], Awaitable[Found]], cells: Iterable[str]) -> None:
        self._poll = poll
        self._cells = frozenset(cells)
        self._polls: dict[frozenset[str], CoalescedPolls] = {}

    async def poll(self, ids: list[str]) -> Found:
        """Polls these jobs, in a round trip that others of the same cells may share."""
        cells = self._cells
        if cells:
            cells = cells.intersection(filter(None, map(cell_of, ids)))
        polls = self._polls.get(cells)
        if polls is None:
            polls = self._polls[cells] = CoalescedPolls(self._poll)
        return await polls.poll(ids)

    async def aclose(self) -> None:
        """Waits for the polls that are under way or gathered."""
        await asyncio.gather(*(polls.aclose() for polls in self._polls.values()))


class CoalescedPolls:
    """Polls jobs for all that wait in an event loop, one round trip at a time."""

    def __init__(self, poll: Callable[[list[str]], Awaitable[Found]]) -> None:
        self._poll = poll
        self._requests: deque[_Request] = deque()
        self._task: asyncio.Task[None] | None = None

    async def poll(self, ids: list[str]) -> Found:
        """Polls these jobs, in a round trip that others may share."""
        found: asyncio.Future[Found] = asyncio.get_running_loop().create_future()
        self._requests.append((ids, found))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._serve(), name="blipq-polls")
        return await found

    async def aclose(self) -> None:
        """Waits for the polls that are under way or gathered."""
        if self._task is not None:
            await self._task

    async def _serve(self) -> None:
        while batch := self._next():
            poll = self._poll([id for ids, _ in batch for id in ids])
            (found,) = await asyncio.gather(poll, return_exceptions=True)
            for ids, future in batch:
                if future.done():  # its caller was cancelled meanwhile
                    continue
                if isinstance(found, BaseException) and not isinstance(found, QueueUnavailable):
                    future.set_exception(found)
                else:
                    future.set_result(found.about(ids) if isinstance(found, Polled) else found)

    def _next(self) -> list[_Request]:
        """Requests whose callers still wait, as many as go into one round trip."""
        batch: list[_Request] = []
        count = 0
        while self._requests and count < MAX_POLLED:
            ids, future = self._requests.popleft()
            if not future.done():
                batch.append((ids, future))
                count += len(ids)
        return batch
