"""Many small questions in few round trips: while one is under way, the next gathers."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

from blipq.client.waiting import LOOK_AT
from blipq.errors import QueueUnavailable
from blipq.ledger.codec import Looked

Found = Looked | QueueUnavailable
_Asked = tuple[list[str], "asyncio.Future[Found]"]


class Looks:
    """Looks at jobs on behalf of all who wait in an event loop, one round trip at a time."""

    def __init__(self, look: Callable[[list[str]], Awaitable[Found]]) -> None:
        self._look = look
        self._asked: deque[_Asked] = deque()
        self._task: asyncio.Task[None] | None = None

    async def look(self, ids: list[str]) -> Found:
        """What a look at these jobs finds."""
        answer: asyncio.Future[Found] = asyncio.get_running_loop().create_future()
        self._asked.append((ids, answer))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._answer_all(), name="blipq-looks")
        return await answer

    async def aclose(self) -> None:
        """Lets what was asked be answered."""
        if self._task is not None:
            await self._task

    async def _answer_all(self) -> None:
        while asked := self._next():
            look = self._look([id for ids, _ in asked for id in ids])
            (found,) = await asyncio.gather(look, return_exceptions=True)
            for ids, answer in asked:
                if answer.done():  # whoever asked was cancelled meanwhile
                    continue
                if isinstance(found, BaseException) and not isinstance(found, QueueUnavailable):
                    answer.set_exception(found)
                else:
                    answer.set_result(found.about(ids) if isinstance(found, Looked) else found)

    def _next(self) -> list[_Asked]:
        """Questions of those who have not left, as many as go into one round trip."""
        asked: list[_Asked] = []
        count = 0
        while self._asked and count < LOOK_AT:
            ids, answer = self._asked.popleft()
            if not answer.done():
                asked.append((ids, answer))
                count += len(ids)
        return asked
