"""Who acts, as the log of actions notes it: a key of the HTTP door, or the user of a process."""

import getpass
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Literal, NamedTuple

Via = Literal["client", "cli", "api"]
#: Of a target that a caller names.
LONGEST_TARGET = 256


class Actor(NamedTuple):
    """Who acts: a key's name, or the user of a process and its host; and by which way."""

    name: str
    via: Via


_acting: ContextVar[Actor | None] = ContextVar("acting", default=None)


@contextmanager
def acting(name: str, via: Via) -> Iterator[None]:
    """Has actions noted as this one's: those here, and in tasks and threads with this context."""
    token = _acting.set(Actor(name, via))
    try:
        yield
    finally:
        _acting.reset(token)


def note_of(action: str, target: str, script: str) -> str:
    """What ``noted.lua`` takes of an action, which a script makes."""
    actor = _acting.get() or Actor(this_user(), "client")
    note = {"name": actor.name, "via": actor.via, "action": action, "script": script}
    return json.dumps({**note, "target": target[:LONGEST_TARGET]})


@cache
def this_user() -> str:
    """The user and host of this process."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = "unknown"
    return f"{user}@{socket.gethostname()}"
