"""Runs the Lua scripts of this folder, each sent once and then called by its hash."""

import functools
import re
from importlib import resources
from typing import Any, Self

import redis
import redis.asyncio

from blipq.ledger.acting import note_of
from blipq.ledger.keys import lua_header
from blipq.ledger.scripts.combining import Combined
from blipq.settings import Settings

_COMMENT = re.compile(r"^ *--.*\n|  --.*$", re.M)
_DEFINITIONS = re.compile(r"^(?=local )", re.M)
_NAME = re.compile(r"local (?:function )?(\w+)")


@functools.cache
def script_text(*names: str, noted: bool = False) -> str:
    """A script, behind what it uses of the names of keys and of the shared functions.

    noted: what it does is noted in the log of actions, by its last argument.
    """
    folder = resources.files(__package__)
    *shared, script = ((folder / f"{name}.lua").read_text() for name in ("common", *names))
    if noted:
        script = (folder / "noted.lua").read_text().replace("--SCRIPT--", script)
    return _with_used(lua_header() + "".join(shared), script)


def _with_used(shared: str, script: str) -> str:
    """A script behind those shared definitions that it comes to: Redis runs them at each call.

    A definition begins with ``local`` at the beginning of a line, and uses only those before it.
    """
    text = _COMMENT.sub("", script)
    for definition in reversed(_DEFINITIONS.split(_COMMENT.sub("", shared))):
        name = _NAME.match(definition)
        if name and re.search(rf"\b{name[1]}\b", text):
            text = definition + text
    return text


class ScriptRunner:
    """Base of the ledger's clients. ``shared``: what stands between ``common.lua`` and a script.

    ``combined``: scripts that threads run in one round trip with what others run at the same time.
    """

    shared: tuple[str, ...] = ()
    combined: frozenset[str] = frozenset()

    def __init__(self, client: "redis.Redis", settings: Settings) -> None:
        self.redis = client
        self.settings = settings
        self._scripts: dict[tuple[str, bool], Any] = {}
        self._combined = Combined(lambda: self.redis.pipeline(transaction=False))

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
        found = self._script(script)
        if script not in self.combined:
            return found(args=args)
        try:
            return self._combined(found.sha, args)
        except redis.exceptions.NoScriptError:
            return found(args=args)

    def _act(self, action: str, target: str, script: str, *args: str | int | float) -> Any:
        """Runs a script, and notes in the log of actions who did it to what."""
        return self._script(script, noted=True)(args=[*args, note_of(action, target, script)])

    def _script(self, script: str, *, noted: bool = False) -> Any:
        if (script, noted) not in self._scripts:
            # redis-py loads it again where Redis lost it.
            text = script_text(*self.shared, script, noted=noted)
            self._scripts[script, noted] = self.redis.register_script(text)
        return self._scripts[script, noted]


class AsyncScriptRunner:
    """Base of the ledger's clients for an event loop."""

    def __init__(self, client: "redis.asyncio.Redis", settings: Settings) -> None:
        self.redis = client
        self.settings = settings
        self._scripts: dict[tuple[str, bool], Any] = {}

    async def aclose(self) -> None:
        """Closes the connections."""
        await self.redis.aclose(close_connection_pool=True)

    async def _run(self, script: str, *args: str | int | float) -> Any:
        return await self._script(script)(args=args)

    async def _act(self, action: str, target: str, script: str, *args: str | int | float) -> Any:
        """Runs a script, and notes in the log of actions who did it to what."""
        return await self._script(script, noted=True)(args=[*args, note_of(action, target, script)])

    def _script(self, script: str, *, noted: bool = False) -> Any:
        if (script, noted) not in self._scripts:
            text = script_text(script, noted=noted)
            self._scripts[script, noted] = self.redis.register_script(text)
        return self._scripts[script, noted]
