"""Runs the Lua scripts of this folder, each sent once and then called by its hash."""

import functools
import re
from collections.abc import Collection, Mapping
from importlib import resources
from typing import Any, Self

import redis
import redis.asyncio

from blipq.ledger.acting import note_of
from blipq.ledger.connection import check_one_cell
from blipq.ledger.keys import lua_header
from blipq.ledger.scripts.combining import Combined
from blipq.settings import Settings

_COMMENT = re.compile(r"^ *--(?!RARELY ).*\n|  --(?!RARELY ).*$", re.M)
_RARELY = re.compile(r"^ *--RARELY (.+)\n", re.M)
_DEFINITIONS = re.compile(r"^(?=local )", re.M)
_NAME = re.compile(r"local (?:function )?(\w+)")
_KEY = re.compile(r"^local function (\w+_key)\(name\) return ('.*' \.\. )name end\n", re.M)


@functools.cache
def script_text(*names: str, noted: bool = False) -> str:
    """A script, behind what it uses of the names of keys and of the shared functions.

    noted: what it does is noted in the log of actions, by its last argument.
    """
    folder = resources.files(__package__)
    *shared, script = ((folder / f"{name}.lua").read_text() for name in ("common", *names))
    if noted:
        script = (folder / "noted.lua").read_text().replace("--SCRIPT--", script)
    text, script = (_COMMENT.sub("", each) for each in (lua_header() + "".join(shared), script))
    keys = dict(_KEY.findall(text))
    text, script = (_with_keys(keys, each) for each in (_KEY.sub("", text), script))
    definitions = {
        name[1]: each for each in _DEFINITIONS.split(text) if (name := _NAME.match(each))
    }
    return _with_used(definitions, script, script)


def _with_keys(keys: Mapping[str, str], text: str) -> str:
    """Lua with the names of keys written out: to make a function costs more than to call it."""
    return re.sub(r"\b(\w+_key)\(", lambda found: f"({keys[found[1]]}", text)


def _with_used(
    definitions: dict[str, str], uses: str, text: str = "", above: Collection[str] = ()
) -> str:
    """Lua behind the definitions that ``uses`` comes to: Redis runs them at each call of a script.

    A definition begins with ``local`` at the beginning of a line, and uses only those before it.
    Those that a line ``--RARELY a b`` names stand in its place, at the beginning of a block that
    few calls run; nothing around that block in the same text uses them.

    above: names that are defined already.
    """
    found: list[str] = []
    searched = _without_rare(uses)
    for name, definition in reversed(definitions.items()):
        if name not in above and re.search(rf"\b{name}\b", searched):
            found.insert(0, name)
            searched += "\n" + _without_rare(definition)
    above = {*above, *found}
    whole = "".join([*map(definitions.__getitem__, found), text])
    return _RARELY.sub(lambda rare: _with_used(definitions, rare[1], above=above), whole)


def _without_rare(text: str) -> str:
    """Lua without the names that it uses in blocks of its own for them."""
    rare = " ".join(_RARELY.findall(text)).split()
    return re.sub(rf"\b(?:{'|'.join(rare)})\b", "", text) if rare else text


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
        """A client of this class on the connections of another. Raises TypeError for a fake.

        Raises InvalidRequest where the other is of several cells.
        """
        settings = getattr(ledger, "settings", None)
        if settings is not None:
            check_one_cell(settings)
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
