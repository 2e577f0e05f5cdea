"""An AsyncClient that is used like a Client: its loop runs on a thread, and every call is awaited.

So one test can be run with both.
"""

import asyncio
import inspect
import threading
from collections.abc import Iterator
from typing import Any

from blipq import AsyncClient, AsyncJob


class Loop:
    """An event loop on a thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()

    def run(self, awaitable: Any) -> Any:
        async def awaited() -> Any:
            return await awaitable

        return asyncio.run_coroutine_threadsafe(awaited(), self.loop).result(timeout=100)

    def iterate(self, items: Any) -> Iterator[Any]:
        try:
            while True:
                try:
                    yield self.run(anext(items))
                except StopAsyncIteration:
                    return
        finally:
            self.run(items.aclose())

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        left = asyncio.all_tasks(self.loop)
        self.loop.close()
        assert not left, f"tasks that outlived their client: {left}"


class Blocking:
    """A client or a job whose methods return what they are awaited for."""

    def __init__(self, what: Any, loop: Loop) -> None:
        self._what = what
        self._loop = loop

    def __repr__(self) -> str:
        return repr(self._what)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Blocking) and self._what == other._what

    def __hash__(self) -> int:
        return hash(self._what)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._what, name)
        if not callable(value):
            return value

        def call(*args: Any, **options: Any) -> Any:
            return self._told(value(*map(unwrapped, args), **options))

        return call

    def _told(self, value: Any) -> Any:
        if inspect.isasyncgen(value):
            return map(self._told, self._loop.iterate(value))
        if inspect.isawaitable(value):
            value = self._loop.run(value)
        if isinstance(value, list):
            return [self._told(item) for item in value]
        return Blocking(value, self._loop) if isinstance(value, AsyncJob) else value


def unwrapped(value: Any) -> Any:
    if isinstance(value, Blocking):
        return value._what
    return [unwrapped(item) for item in value] if isinstance(value, list) else value


class BlockingClient(Blocking):
    """A Client to look at, an AsyncClient inside."""

    def __init__(self, *args: Any, **options: Any) -> None:
        loop = Loop()
        super().__init__(AsyncClient(*args, **options), loop)

    def __enter__(self) -> "BlockingClient":
        return self

    def __exit__(self, *_: Any) -> None:
        self._loop.run(self._what.aclose())
        self._loop.close()
