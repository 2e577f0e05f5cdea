"""An operator's view of several cells as one: lists merged, counts summed, a job where it is."""

import heapq
import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, TypeVar

from blipq.contract import JobInfo, Status
from blipq.errors import QueueUnavailable
from blipq.ledger.cells.producer import CellsLedger
from blipq.ledger.codec import Message
from blipq.ledger.connection import connect
from blipq.ledger.operator import CHUNK, OperatorLedger, QueueState
from blipq.ledger.scripts.runner import ScriptRunner
from blipq.ledger.views.actions import Action, ActionLog
from blipq.ledger.views.listing import Listing, Page, Place, Wanted
from blipq.ledger.views.runs import MOST as MOST_RUNS
from blipq.ledger.views.runs import Run, Runs
from blipq.ledger.views.tenants import TenantState
from blipq.redis.cells import Cells, ranked
from blipq.settings import Settings

T = TypeVar("T")
RunnerT = TypeVar("RunnerT", bound=ScriptRunner)


def operator_of(ledger: object) -> OperatorLedger:
    """An operator's ledger on the connections of a client's. Raises TypeError for a fake."""
    each = beside_each(OperatorLedger, ledger)
    if each is None or not isinstance(ledger, CellsLedger | CellsOperator):
        return OperatorLedger.beside(ledger)
    return CellsOperator(ledger.settings, each)


def operator_for(settings: Settings) -> OperatorLedger:
    """An operator's ledger of its own connections."""
    if not settings.is_fleet:
        return OperatorLedger(connect(settings), settings)
    each = settings.by_cell.items()
    return CellsOperator(settings, {name: OperatorLedger(connect(own), own) for name, own in each})


def beside_each(kind: type[RunnerT], ledger: object) -> dict[str, RunnerT] | None:
    """Clients of a kind on the connections of each cell; None for the ledger of one Redis."""
    if not isinstance(ledger, CellsLedger | CellsOperator):
        return None
    return {name: kind.beside(each) for name, each in ledger.ledgers.items()}


def actions_of(ledger: object, limit: int, before: str | None = None) -> list[Action]:
    """The newest actions of all cells first, or those before the one of an id."""
    logs = beside_each(ActionLog, ledger)
    if logs is None:
        return ActionLog.beside(ledger).latest(limit, before)
    found = itertools.chain(*(log.latest(limit, before) for log in logs.values()))
    return sorted(found, key=lambda action: [*map(int, action.id.split("-"))], reverse=True)[:limit]


def runs_of(ledger: object) -> list[Run]:
    """The runs of bulks that any cell has, those that were noted last first."""
    each = beside_each(Runs, ledger)
    if each is None:
        return Runs.beside(ledger).newest()
    found = itertools.chain(*(runs.newest() for runs in each.values()))
    # A cell that was drained has old notes of a run that is noted elsewhere now.
    newest: dict[str, Run] = {}
    for run in sorted(found, key=lambda run: -run.at):
        newest.setdefault(run.id, run)
    return [*newest.values()][:MOST_RUNS]


def home_of(ledger: object, name: str) -> OperatorLedger:
    """The ledger of the cell that keeps something of a name: with one Redis that one."""
    operator = operator_of(ledger)
    return operator.home(name) if isinstance(operator, CellsOperator) else operator


class CellsListing(Listing):
    """Lists of jobs of several cells. Places are the same in all of them: times and ids."""

    def __init__(self, listings: Iterable[Listing]) -> None:
        self._listings = list(listings)

    def page(self, wanted: Wanted, *, limit: int, after: Place | None = None) -> Page:
        """At most ``limit`` jobs behind a place, of all cells."""
        pages = [each.page(wanted, limit=limit, after=after) for each in self._listings]
        # Down to here each cell was read; below, one of them may have jobs that are not here.
        reached = max((page.next for page in pages if page.next is not None), default=None)
        placed = ((_place(info), info) for page in pages for info in page.jobs)
        found = sorted(placed, key=lambda each: each[0], reverse=True)
        whole = [each for each in found if reached is None or each[0] >= reached]
        following = whole[limit - 1][0] if len(whole) > limit else reached
        jobs = [info for _, info in whole[:limit]]
        return Page(jobs, following, sum(page.read for page in pages))

    def newest(self, name: str, limit: int) -> list[str]:
        """One field of the newest jobs of each cell."""
        return [text for each in self._listings for text in each.newest(name, limit)]


class CellsOperator(OperatorLedger):
    """``OperatorLedger`` for several cells. Raises QueueUnavailable if one of them is away."""

    def __init__(self, settings: Settings, ledgers: Mapping[str, OperatorLedger]) -> None:
        self.settings = settings
        self.cells = Cells.of(settings.cells, settings.cell_lists)
        self.ledgers = dict(ledgers)

    def home(self, name: str) -> OperatorLedger:
        """The cell that keeps something of a name which is no job."""
        return self.ledgers[ranked(name, self.cells.current)[0]]

    def _each(self, work: Callable[[OperatorLedger], T]) -> list[T]:
        return [work(ledger) for ledger in self.ledgers.values()]

    def _found(self, id: str, work: Callable[[OperatorLedger], T]) -> tuple[str | None, T | None]:
        """What the cell that knows a job answers, and its name."""
        away: QueueUnavailable | None = None
        for cell in self.cells.likely(id):
            if cell not in self.ledgers:
                continue
            try:
                if answer := work(self.ledgers[cell]):
                    return cell, answer
            except QueueUnavailable as error:
                away = error
        if away is not None:
            raise away
        return None, None

    @property
    def listing(self) -> Listing:
        """Lists of jobs, in pages."""
        return CellsListing(ledger.listing for ledger in self.ledgers.values())

    def read(self, id: str) -> JobInfo | None:
        """A job as it is now; None for an unknown id."""
        return self._found(id, lambda ledger: ledger.read(id))[1]

    def open_jobs(self) -> int:
        """How many jobs have not ended."""
        return sum(self._each(OperatorLedger.open_jobs))

    def running(self) -> int:
        """How many jobs a worker holds."""
        return sum(self._each(OperatorLedger.running))

    def delayed(self) -> int:
        """How many jobs wait for a retry."""
        return sum(self._each(OperatorLedger.delayed))

    def jobs(
        self, *, status: Status | None = None, model: str | None = None, limit: int = 100
    ) -> list[JobInfo]:
        """At most ``limit`` jobs with their results, the newest first."""
        lists = self._each(lambda each: each.jobs(status=status, model=model, limit=limit))
        return _newest(lists, _place, limit)

    def request(self, id: str) -> dict[str, Any] | None:
        """A job's request as it is stored: without defaults. None for an unknown id."""
        return self._found(id, lambda ledger: ledger.request(id))[1]

    def ended_after(self) -> tuple[float, list[float]]:
        """The time now, and when the newest jobs of each cell ended, the latest first."""
        found = self._each(OperatorLedger.ended_after)
        ended = heapq.merge(*(times for _, times in found), reverse=True)
        return max(now for now, _ in found), list(itertools.islice(ended, CHUNK))

    def queues(self) -> list[QueueState]:
        """The state of each queue: paused where it is in every cell that has it."""
        found: dict[str, QueueState] = {}
        for state in itertools.chain(*self._each(OperatorLedger.queues)):
            one = found.get(state.queue)
            found[state.queue] = state if one is None else _both(one, state)
        return [found[name] for name in sorted(found)]

    def purge(self, queue: str) -> int:
        """Cancels the jobs that wait in a queue; returns how many."""
        return sum(self._each(lambda ledger: ledger.purge(queue)))

    def tenants(self) -> list[TenantState]:
        """Those that have open jobs or limits. The limits hold in each cell."""
        found: dict[str, TenantState] = {}
        for state in itertools.chain(*self._each(OperatorLedger.tenants)):
            one = found.get(state.tenant)
            if one is not None:
                oldest = _most(one.oldest_s, state.oldest_s)
                state = replace(state, open=one.open + state.open, oldest_s=oldest)
            found[state.tenant] = state
        return sorted(found.values(), key=lambda each: (-each.open, each.tenant))

    def workers(self) -> dict[str, dict[str, Any]]:
        """The live workers by name, with their cell and what each reports of itself."""
        return {
            name: {"cell": cell, **report}
            for cell, ledger in self.ledgers.items()
            for name, report in ledger.workers().items()
        }

    def dead(self) -> int:
        """How many dead letters there are."""
        return sum(self._each(OperatorLedger.dead))

    def dead_letters(self, limit: int = 100) -> list[JobInfo]:
        """At most ``limit`` dead letters, the newest first."""
        return _newest(self._each(lambda ledger: ledger.dead_letters(limit)), _ended, limit)

    def retry_dead_letter(self, id: str) -> Message | None:
        """Queues a dead letter again, with fresh attempts; the message to publish."""
        cell, message = self._found(id, lambda ledger: ledger.retry_dead_letter(id))
        return None if message is None else replace(message, cell=cell)

    def drop_dead_letter(self, id: str) -> bool:
        """Deletes a dead letter and its job; False if the id is not one of a dead letter."""
        return bool(self._found(id, lambda ledger: ledger.drop_dead_letter(id))[1])

    def delete(self, id: str) -> bool:
        """Deletes the record of a job that has ended."""
        return bool(self._found(id, lambda ledger: ledger.delete(id))[1])

    def close(self) -> None:
        """Closes the connections."""
        for ledger in self.ledgers.values():
            ledger.close()


def _place(info: JobInfo) -> Place:
    return Place(round(info.created_at.timestamp() * 1000), info.id)


def _ended(info: JobInfo) -> datetime:
    return info.completed_at or datetime.fromtimestamp(0, UTC)


def _newest(
    lists: Iterable[list[JobInfo]], key: Callable[[JobInfo], Any], limit: int
) -> list[JobInfo]:
    return sorted(itertools.chain(*lists), key=key, reverse=True)[:limit]


def _most(one: float | None, other: float | None) -> float | None:
    return max((each for each in (one, other) if each is not None), default=None)


def _both(one: QueueState, other: QueueState) -> QueueState:
    return QueueState(
        one.queue,
        one.waiting + other.waiting,
        _most(one.oldest_s, other.oldest_s),
        one.live_workers + other.live_workers,
        one.paused and other.paused,
    )
