"""Work of which a door does so much at a time: threads, and bodies that are held whole."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from contextvars import ContextVar
from weakref import WeakValueDictionary

import anyio

from blipq_api.problems import Problem

#: Longest wait for a turn.
TURN_TIMEOUT_S = 10.0
#: Of what a door does at a time, the share that one key may have.
KEY_SHARE = 0.5

#: The name of the key whose request this task answers; None on a door without keys.
holder: ContextVar[str | None] = ContextVar("holder", default=None)


class Turns:
    """Turns that are taken at the same time, of which a key has its share at most.

    A key that sends slowly, or that has much to be read, waits for itself and not others for it.
    """

    def __init__(self, most: int) -> None:
        self._all = anyio.CapacityLimiter(most)
        self._share = max(1, int(KEY_SHARE * most))
        # Only while requests of a key hold or await a turn.
        self._of: WeakValueDictionary[str, anyio.CapacityLimiter] = WeakValueDictionary()

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """One turn. Raises Problem where none comes in time."""
        token = object()
        limiters = self._limiters()
        async with AsyncExitStack() as held:
            try:
                async with asyncio.timeout(TURN_TIMEOUT_S):
                    for each in limiters:
                        await each.acquire_on_behalf_of(token)
                        held.callback(each.release_on_behalf_of, token)
            except TimeoutError:
                text = "the door is busy with other lists and uploads"
                raise Problem(503, "busy", text, retry_after_s=TURN_TIMEOUT_S) from None
            yield

    def _limiters(self) -> list[anyio.CapacityLimiter]:
        """The key's own first: who waits there holds no place that others could have."""
        name = holder.get()
        if name is None:
            return [self._all]
        own = self._of.get(name)
        if own is None:
            self._of[name] = own = anyio.CapacityLimiter(self._share)
        return [own, self._all]
