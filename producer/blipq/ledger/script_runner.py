"""Runs the Lua scripts of ``scripts/``, each sent once and then called by its hash."""

import functools
from importlib import resources
from typing import Any, Self

import redis
import redis.asyncio

from blipq.ledger.keys import lua_header
from blipq.settings import Settings


@functools.cache
def script_text(*names: str) -> str:
    """A script, behind the names of keys and the shared functions."""
    folder = resources.files("blipq.ledger") / "scripts"
    texts = ((folder / f"{name}.lua").read_text() for name in ("common", *names))
    return lua_header() + "".join(texts)


class ScriptRunner:
    """Base of the ledger's clients. ``shared``: what stands between ``common.lua`` and a script."""

    shared: tuple[str, ...] = ()

    def __init__(self, client: "redis.Redis", settings: Settings) -> None:
        self.redis = client
        self.settings = settings
        self._scripts: dict[str, Any] = {}

    @classmethod
    def beside(cls, ledger: object) -> Self:
        """A client of this class on the connections of another. Raises TypeError for a fake."""
        if not isinstance(ledger, ScriptRunner):
            raise TypeError(f"{type(ledger).__name__} has no Redis")
        return cls(ledger.redis, ledger.settings)

    def close(self) -> None:
        """Closes the connections."""
        self.redis.close()

    def _run(self, script: str, *args: str | int | float) -> Any:
        if script not in self._scripts:
            # redis-py loads it again where Redis lost it.
            text = script_text(*self.shared, script)
            self._scripts[script] = self.redis.register_script(text)
        return self._scripts[script](args=args)


class AsyncScriptRunner:
    """Base of the ledger's clients for an event loop."""

    def __init__(self, client: "redis.asyncio.Redis", settings: Settings) -> None:
        self.redis = client
        self.settings = settings
        self._scripts: dict[str, Any] = {}

    async def aclose(self) -> None:
        """Closes the connections."""
        await self.redis.aclose(close_connection_pool=True)

    async def _run(self, script: str, *args: str | int | float) -> Any:
        if script not in self._scripts:
            self._scripts[script] = self.redis.register_script(script_text(script))
        return await self._scripts[script](args=args)
