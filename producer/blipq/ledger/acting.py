"""Who acts, as the log of actions notes it: a key of the HTTP door, or the user of a process."""

import getpass
import json
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Literal, NamedTuple

Via = Literal["client", "cli", "api"]
#: Of a target that a caller names.
LONGEST_TARGET = 256


class _Command(NamedTuple):
    """What is done in parts, and noted as one. ``target``: None for that of the first part."""

    id: str
    target: str | None


class Actor(NamedTuple):
    """Who acts: a key's name, or the user of a process and its host; and by which way."""

    name: str
    via: Via


_acting: ContextVar[Actor | None] = ContextVar("acting", default=None)
_command: ContextVar[_Command | None] = ContextVar("command", default=None)


@contextmanager
def acting(name: str, via: Via) -> Iterator[None]:
    """Has actions noted as this one's: those here, and in tasks and threads with this context."""
    token = _acting.set(Actor(name, via))
    try:
        yield
    finally:
        _acting.reset(token)


@contextmanager
def as_one(target: str | None = None) -> Iterator[None]:
    """Has the parts of a command noted in one line, which counts all of them.

    A line for each part of a large one would push out those of others. A command within another is
    a part of that one.
    """
    if _command.get() is not None:
        yield
        return
    token = _command.set(_Command(secrets.token_hex(8), target))
    try:
        yield
    finally:
        _command.reset(token)


def note_of(action: str, target: str, script: str) -> str:
    """What ``noted.lua`` takes of an action, which a script makes."""
    actor = _acting.get() or Actor(this_user(), "client")
    note = {"name": actor.name, "via": actor.via, "action": action, "script": script}
    if (command := _command.get()) is not None:
        note["command"] = command.id
        target = command.target or target
    return json.dumps({**note, "target": target[:LONGEST_TARGET]})


@cache
def this_user() -> str:
    """The user and host of this process."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = "unknown"
    return f"{user}@{socket.gethostname()}"
