"""What the ledgers of several cells come to as one. Pure: it yields the calls to make of each."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, cast

from blipq.contract import JobInfo, Options
from blipq.errors import QueueUnavailable, UnknownModel
from blipq.ledger import codec
from blipq.ledger.cells.calls import Calls, call
from blipq.ledger.cells.health import Health
from blipq.ledger.cells.placing import Answer, Placing
from blipq.ledger.changes import Changed, Chunk
from blipq.ledger.codec import Cancelled, Polled, Prepared
from blipq.ledger.erasure import Erased
from blipq.redis.cells import Cells, cell_of
from blipq.settings import Settings

_FIRST = "0"


class Fleet:
    """The calls behind each method of ``Producer`` and ``AsyncProducer``."""

    def __init__(self, settings: Settings) -> None:
        self.cells = Cells.of(settings.cells, settings.cell_lists)
        self.health = Health(self.cells.names)
        self._placing = Placing(self.cells, self.health)

    # -- submits --

    def make_id(self, options: Options) -> str | Calls[str]:
        return self._placing.make_id(options)

    def submit_all(self, jobs: Sequence[Prepared]) -> Calls[list[Answer]]:
        return self._placing.submit_all(jobs)

    def check_models(self, models: Iterable[str]) -> Calls[None]:
        named = sorted(set(models))
        for model in named:
            yield from self._placing.check_model(model)
        if not named:  # whether a cell answers at all
            yield from self._any("check_models", [])

    def _any(self, method: str, *args: Any) -> Calls[Any]:
        """The answer of the first cell that takes jobs and answers."""
        why: QueueUnavailable | None = None
        for cell in self.health.failed_last(self.cells.current):
            try:
                return (yield call(cell, method, *args))
            except QueueUnavailable as error:
                why = error
        assert why is not None, "a list has a cell"
        raise why

    # -- a job --

    def read(self, id: str) -> Calls[JobInfo | None]:
        return cast("JobInfo | None", (yield from self._found("read", id, None)))

    def cancel(self, id: str) -> Calls[Cancelled]:
        return cast(Cancelled, (yield from self._found("cancel", id, "unknown")))

    def _found(self, method: str, id: str, unknown: Any) -> Calls[Any]:
        """The answer of the cell that has a job; ``unknown`` where all answer that."""
        away: QueueUnavailable | None = None
        for cell in self.health.failed_last(self._likely(id)):
            try:
                answer = yield call(cell, method, id)
            except QueueUnavailable as error:
                away = error
            else:
                if answer != unknown:
                    return answer
        if away is not None:
            raise away
        return unknown

    def _likely(self, id: str) -> list[str]:
        found = self.cells.likely(id)
        self._placing.check_named(found[0], id)
        return found

    # -- many jobs --

    def poll(self, ids: Sequence[str], *, notify: str) -> Calls[Polled]:
        """Raises QueueUnavailable where no cell of these jobs answers."""
        found = Polled({}, set(), {})
        left: dict[str, list[str]] = {}
        away: dict[str, QueueUnavailable] = {}
        for id in ids:
            try:
                left[id] = self._likely(id)
            except QueueUnavailable as error:  # in a cell without a name: it holds up no other
                away[id] = error
        found.unknown.update(away)
        while left:
            groups: dict[str, list[str]] = {}
            for id, cells in left.items():
                groups.setdefault(cells[0], []).append(id)
            unknown: set[str] = set()
            for cell, group in groups.items():
                answer = yield from self._polled(cell, group, notify)
                if isinstance(answer, QueueUnavailable):
                    away |= dict.fromkeys(group, answer)
                    unknown.update(group)
                else:
                    unknown |= answer.unknown
                    found = _both(found, answer)
            left = {id: rest for id in unknown if (rest := left[id][1:])}
            found.unknown.update(unknown - left.keys())
        # While a cell is away, the others' "unknown" does not mean that the job does not exist.
        away = {id: why for id, why in away.items() if id in found.unknown}
        if away and len(away) == len(set(ids)):
            raise next(iter(away.values()))
        return replace(found, unknown=found.unknown - away.keys(), away=away)

    def _polled(self, cell: str, ids: list[str], notify: str) -> Calls[Polled | QueueUnavailable]:
        """One cell's reply; at once an error while it is away, so that it holds up no other."""
        if (why := self.health.away(cell)) is not None:
            return QueueUnavailable(str(why), codec.only(ids))
        try:
            return cast(Polled, (yield call(cell, "poll", ids, notify=notify)))
        except QueueUnavailable as error:
            return error

    def change(self, chunk: Chunk) -> Calls[Changed]:
        if chunk.change.where is None:
            return (yield from self._change_ids(chunk))
        name, _, cursor = chunk.cursor.rpartition(" ")
        cell = name or self.cells.names[0]
        changed = yield call(cell, "change", replace(chunk, cursor=cursor))
        if changed.cursor != _FIRST:
            following = f"{cell} {changed.cursor}"
        else:
            later = self.cells.names[self.cells.names.index(cell) + 1 :]
            following = f"{later[0]} {_FIRST}" if later else _FIRST
        return replace(_of(changed, cell), cursor=following)

    def _change_ids(self, chunk: Chunk) -> Calls[Changed]:
        found = Changed([])
        for cell, ids in self._by_cell(chunk.ids).items():
            changed = _of((yield call(cell, "change", replace(chunk, ids=tuple(ids)))), cell)
            found = Changed(
                found.ids + changed.ids,
                found.messages + changed.messages,
                full=found.full or changed.full,
                limited=changed.limited or found.limited,
            )
        return found

    def _by_cell(self, ids: Iterable[str]) -> dict[str, list[str]]:
        """Ids by the cell in them; a job whose id has none may be in any."""
        found: dict[str, list[str]] = {}
        for id in ids:
            for cell in self.cells.names if cell_of(id) is None else self._likely(id):
                found.setdefault(cell, []).append(id)
        return found

    def forget(
        self, ids: Sequence[str], *, erase: bool, only_ended: bool = False
    ) -> Calls[list[Erased]]:
        found: list[Erased] = []
        for cell, own in self._by_cell(ids).items():
            found += yield call(cell, "forget", own, erase=erase, only_ended=only_ended)
        return found

    def named(self, uris: Sequence[str]) -> Calls[set[str]]:
        return set().union(*(yield from self._all("named", uris)))

    def release(self, ids: Sequence[str]) -> Calls[int]:
        released = 0
        for cell, own in self._by_cell(ids).items():
            released += yield call(cell, "release", own)
        return released

    # -- queues and tenants --

    def pause(self, queue: str) -> Calls[int]:
        return (yield from self._queue("pause", queue))

    def resume(self, queue: str) -> Calls[int]:
        return (yield from self._queue("resume", queue))

    def _queue(self, method: str, queue: str) -> Calls[int]:
        """In each cell that knows its model. Raises UnknownModel where none does.

        Raises QueueUnavailable if one is away, after the others.
        """
        waiting: list[int] = []
        unknown: UnknownModel | None = None
        away: QueueUnavailable | None = None
        for cell in self.cells.names:
            try:
                waiting.append((yield call(cell, method, queue)))
            except UnknownModel as error:
                unknown = error
            except QueueUnavailable as error:
                away = error
        if away is not None:
            raise away
        if unknown is not None and not waiting:
            raise unknown
        return sum(waiting)

    def limit(self, tenant: str, open_jobs: int | None, rate: float | None) -> Calls[None]:
        yield from self._all("limit", tenant, open_jobs, rate)

    def _all(self, method: str, *args: Any) -> Calls[list[Any]]:
        """What each cell answers. Raises QueueUnavailable if one is away, after the others."""
        answers, away = [], None
        for cell in self.cells.names:
            try:
                answers.append((yield call(cell, method, *args)))
            except QueueUnavailable as error:
                away = error
        if away is not None:
            raise away
        return answers


def _of(changed: Changed, cell: str) -> Changed:
    messages = [replace(message, cell=cell) for message in changed.messages]
    return replace(changed, messages=messages)


def _both(one: Polled, other: Polled) -> Polled:
    return Polled(
        {**one.ended, **other.ended},
        one.unknown,
        {**one.elsewhere, **other.elsewhere},
        max(one.left, other.left),
        one.later | other.later,
    )
