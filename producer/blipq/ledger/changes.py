"""Changes of many jobs at once: cut into chunks, each a script that is soon done.

Pure, so that the synchronous and the asynchronous clients share it.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from blipq.contract import JobFilter, Priority
from blipq.errors import InvalidRequest, QueueFull, TenantLimited
from blipq.ledger import codec, keys
from blipq.ledger.codec import Message, ms
from blipq.settings import Settings

#: Records that one script goes through, or ids that it takes: a few milliseconds of Redis' time.
CHUNK = 200

Action = Literal["match", "cancel", "retry", "move"]
_FIRST = _LAST = "0"


@dataclass(frozen=True, slots=True)
class Change:
    """What to do with which jobs: those of a filter, or of ids.

    ``match`` changes nothing. ``retry`` is for jobs that ended without a result, of dead letters
    alone if ``dead``; ``move`` puts jobs that wait into the queue of another ``priority``. A
    ``dry_run`` finds those that would be changed.
    """

    action: Action
    where: JobFilter | None
    ids: tuple[str, ...] = ()
    priority: Priority | None = None
    dead: bool = False
    dry_run: bool = False

    @classmethod
    def of(cls, action: Action, which: JobFilter | Sequence[str], **options: Any) -> "Change":
        """A change of a filter's jobs, or of those of ids."""
        if isinstance(which, JobFilter):
            return cls(action, which, **options)
        if isinstance(which, str):
            raise InvalidRequest("name jobs by a list of ids, or by a JobFilter")
        return cls(action, None, tuple(which), **options)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a change: from a cursor on, or its ids."""

    change: Change
    cursor: str
    ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Changed:
    """What a chunk came to: the jobs that were changed, and the messages to publish.

    ``cursor`` is of the next chunk. ``full``: too many jobs are open for the rest. ``limited``: a
    tenant of which there are too many, with how many it may have.
    """

    ids: list[str]
    messages: list[Message] = field(default_factory=list)
    cursor: str = _LAST
    full: bool = False
    limited: tuple[str, int] | None = None


class Changing:
    """A change under way: the chunks to run, and the sum of what they came to."""

    def __init__(self, change: Change) -> None:
        self.count = 0
        self._change = change
        self._cursor: str | None = _FIRST
        self._at = 0
        self._limited: tuple[str, int] | None = None

    def next(self) -> Chunk | None:
        """The next chunk, or None when all have been run."""
        if self._is_done:
            return None
        if self._change.where is not None:
            return Chunk(self._change, self._cursor or _FIRST, ())
        return Chunk(self._change, _FIRST, self._change.ids[self._at : self._at + CHUNK])

    @property
    def _is_done(self) -> bool:
        if self._change.where is not None:
            return self._cursor is None
        return self._at >= len(self._change.ids)

    def took(self, changed: Changed) -> None:
        """Takes in what the chunk came to.

        Raises QueueFull, and after the last chunk TenantLimited: a tenant at its limit holds up no
        jobs of others.
        """
        self.count += len(changed.ids)
        self._at += CHUNK
        self._cursor = None if changed.cursor == _LAST else changed.cursor
        self._limited = changed.limited or self._limited
        done = f"{self.count:,} are queued again, the others are not"
        if changed.full:
            raise QueueFull(f"too many jobs are open (BLIPQ_MAX_OPEN_JOBS): {done}")
        if self._limited is not None and self._is_done:
            tenant, most = self._limited
            raise TenantLimited(tenant, "open_jobs", most, done=f": {done}")


def arguments(chunk: Chunk, settings: Settings) -> Iterator[str | int]:
    """The change script's arguments."""
    change = chunk.change
    options = {
        "dry": change.dry_run,
        "dead": change.dead,
        "priority": change.priority or Priority.NORMAL,
        "expires_in": ms(settings.default_expires_in),
        "retention": codec.retention_ms(settings),
        "max_open": settings.max_open_jobs,
    }
    where = {} if change.where is None else change.where.model_dump(mode="json", exclude_none=True)
    yield from (change.action, json.dumps(options), json.dumps(where))
    yield from (chunk.cursor, CHUNK) if change.where is not None else ("ids", *chunk.ids)


def noted(chunk: Chunk) -> tuple[str, str] | None:
    """A chunk's entry in the log of actions: its action, and the filter or the ids.

    None where nothing is changed.
    """
    change = chunk.change
    if change.dry_run or change.action == "match":
        return None
    return change.action, target_of(chunk.ids if change.where is None else change.where)


def target_of(which: JobFilter | Sequence[str]) -> str:
    """What the log of actions names: a filter, or ids.

    Metadata is named without its values: the log outlives the jobs, also those that are erased.
    """
    if not isinstance(which, JobFilter):
        return " ".join(which)
    where = which.model_dump(mode="json", exclude_none=True)
    if "metadata" in where:
        where["metadata"] = sorted(where["metadata"])
    return json.dumps(where)


def changed(answer: Sequence[Any]) -> Changed:
    """The change script's reply."""
    cursor, full, ids, found, met = answer
    tenant, _, most = met.partition(" ")
    limited = (tenant, int(most)) if tenant else None
    return Changed(list(ids), codec.messages(found), str(cursor), bool(full), limited)


def pause_arguments(queue: str, pause: bool, settings: Settings) -> Iterator[str]:
    """The pause script's arguments. Raises InvalidRequest for what is no queue's name."""
    check_queue(queue)
    yield from (queue, "pause" if pause else "resume", codec.declared_models(settings))


def check_queue(queue: str) -> None:
    """Raises InvalidRequest for what is no queue's name."""
    if not keys.is_queue(queue):
        raise InvalidRequest(f"queue: {queue[:100]!r} is not of the form blipq.MODEL.PRIORITY")


def waiting(queue: str, answer: Sequence[Any]) -> int:
    """The pause script's reply: how many jobs wait in the queue. Raises UnknownModel."""
    count, *served = answer
    if served:
        raise codec.unknown_model(keys.model_of(queue), served[0])
    return int(count)
