"""In which cell a new job is recorded: once, whatever lists of cells its clients have. Pure."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

from blipq.contract import Options
from blipq.errors import BlipqError, QueueFull, QueueUnavailable, UnknownModel
from blipq.ledger import codec
from blipq.ledger.cells.calls import Calls, call
from blipq.ledger.cells.health import Health
from blipq.ledger.codec import Moved, Placed, Prepared, Recorded
from blipq.redis.cells import Cells, cell_of, id_in, ranked
from blipq.submission import new_id

Answer = Recorded | BlipqError


@dataclass(slots=True)
class _Way:
    """A job on its way to the cell that records it: the cells left to consult, the last records."""

    index: int
    job: Prepared
    path: list[tuple[int, str]]

    @property
    def step(self) -> tuple[str, str, int]:
        """The cell to consult now, the place and the name of the one behind it or "", its place."""
        (place, cell), *behind = self.path
        return cell, f"{behind[0][0]} {behind[0][1]}" if behind else "", place


@dataclass(slots=True)
class _Chunk:
    """What became of jobs, by their places in a chunk."""

    jobs: Sequence[Prepared]
    answers: dict[int, Answer] = field(default_factory=dict)

    def settled(self) -> list[Answer]:
        """The answers up to the first refusal, as of one ledger.

        Behind it jobs of other cells may be recorded: submitted again they are known.
        """
        found: list[Answer] = []
        for index in range(len(self.jobs)):
            if index not in self.answers:
                break
            found.append(self.answers[index])
            if isinstance(found[-1], BlipqError):
                break
        return found

    def take(self, indexes: Sequence[int], answers: Sequence[Placed]) -> None:
        """What a cell answered, which ends at its first refusal."""
        for index, answer in zip(indexes, answers, strict=False):
            if not isinstance(answer, Moved):
                self.answers[index] = answer


class Placing:
    """Places jobs among cells."""

    def __init__(self, cells: Cells, health: Health) -> None:
        self._cells = cells
        self._health = health

    # -- new ids --

    def make_id(self, options: Options) -> str | Calls[str]:
        """An id that ends with its cell; the calls that choose one, where some are needed.

        Without a key the cell is one that can be reached and knows the model: nothing was sent yet,
        so another one can be taken. With a key the submit decides, and may give another id.
        """
        id, cells = new_id(), self._cells.current
        if options.idempotency_key is not None:
            return f"{id}_{ranked(options.idempotency_key, cells)[0]}"
        first = cells[int(id[-8:], 16) % len(cells)]  # these digits are random
        if self._health.is_ready(first, options.model):
            return f"{id}_{first}"
        return self._choose(id, first, options.model)

    def _choose(self, id: str, first: str, model: str) -> Calls[str]:
        others = (cell for cell in self._cells.current if cell != first)
        ranks = [first, *ranked(id, others)]
        away: list[str] = []
        for cell in ranks:
            try:
                if self._health.away(cell) is None:
                    yield from self._check(cell, model)
                    yield from self._reach(cell)
                    return f"{id}_{cell}"
            except UnknownModel:
                continue
            except QueueUnavailable:
                pass
            away.append(cell)
        return f"{id}_{[*away, *ranks][0]}"  # whose answer to the submit has the error

    def _reach(self, cell: str) -> Calls[None]:
        if not self._health.is_fresh(cell):
            with_an_answer = self._health.has_failed(cell)
            yield call(cell, "reach", with_an_answer)

    # -- models --

    def _check(self, cell: str, model: str) -> Calls[None]:
        """Raises UnknownModel if a job for the model would be refused by a cell."""
        if self._health.knows(cell, model):
            return
        try:
            yield call(cell, "check_models", [model])
        except UnknownModel:
            self._health.learn(cell, model, False)
            raise
        self._health.learn(cell, model, True)

    def check_model(self, model: str) -> Calls[None]:
        """Raises UnknownModel if no cell that takes jobs knows the model."""
        why: BlipqError | None = None
        for cell in self._health.failed_last(self._cells.current):
            try:
                yield from self._check(cell, model)
            except UnknownModel as error:
                why = why or error
            except QueueUnavailable as error:
                why = error
            else:
                return
        assert why is not None, "a list has a cell"
        raise why

    def _learn(self, model: str) -> Calls[None]:
        """Learns which cells know a model, as far as that is not known lately.

        One that does not answer counts as one that does: a job of it must not go elsewhere.
        """
        for cell in self._cells.names:
            if self._health.knows(cell, model) is None and self._health.away(cell) is None:
                try:
                    yield from self._check(cell, model)
                except (UnknownModel, QueueUnavailable):
                    continue

    # -- submits --

    def submit_all(self, jobs: Sequence[Prepared]) -> Calls[list[Answer]]:
        """Records jobs as ``Producer.submit_all`` does."""
        if len(jobs) == 1 and (cell := _cell_in_id(jobs[0])) is not None:
            return (yield from self._submit_there(cell, jobs))
        chunk = _Chunk(jobs)
        named: dict[str, list[int]] = {}
        ways: list[_Way] = []
        serves: dict[str, Callable[[str], bool] | BlipqError] = {}
        for index, job in enumerate(jobs):
            if (cell := _cell_in_id(job)) is not None:
                named.setdefault(cell, []).append(index)
                continue
            model = job.submission.options.model
            if model not in serves:
                serves[model] = yield from self._served(model)
            found = serves[model]
            if isinstance(found, BlipqError):
                chunk.answers[index] = found
            else:
                ways.append(_Way(index, job, self._cells.path(_text(job), found)))
        for cell, indexes in named.items():
            there = [jobs[index] for index in indexes]
            chunk.take(indexes, (yield from self._submit_there(cell, there)))
        while ways:
            ways = yield from self._go_on(chunk, ways)
        return chunk.settled()

    def _submit_there(self, cell: str, jobs: Sequence[Prepared]) -> Calls[list[Answer]]:
        """Jobs whose ids end with their cell."""
        try:
            self.check_named(cell, jobs[0].submission.id)
            return cast("list[Answer]", (yield call(cell, "submit_all", jobs)))
        except (QueueUnavailable, QueueFull) as error:
            return [error]

    def check_named(self, cell: str, id: str) -> None:
        """Raises QueueUnavailable for a cell that these settings do not name."""
        if cell not in self._cells.names:
            raise QueueUnavailable(
                f"job {id} is in the cell {cell!r}, which BLIPQ_CELLS does not name", id
            )

    def _served(self, model: str) -> Calls[Callable[[str], bool] | BlipqError]:
        """Whether a cell serves a model, once that is learned; why a job for it is refused."""
        if any(self._health.knows(cell, model) is None for cell in self._cells.names):
            yield from self._learn(model)
        serves = self._serves(model)
        if not any(map(serves, self._cells.current)):
            try:
                yield from self.check_model(model)  # what no cell knows must leave nothing in them
            except (UnknownModel, QueueUnavailable) as error:
                return error
            serves = self._serves(model)
        return serves

    def _serves(self, model: str) -> Callable[[str], bool]:
        knows = self._health.knows
        return {cell for cell in self._cells.names if knows(cell, model) is not False}.__contains__

    def _go_on(self, chunk: _Chunk, ways: list[_Way]) -> Calls[list[_Way]]:
        """Consults the next cell of each job; the ways that go on."""
        groups: dict[tuple[str, str, int], list[_Way]] = {}
        for way in ways:
            groups.setdefault(way.step, []).append(way)
        left: list[_Way] = []
        for (cell, onward, place), group in groups.items():
            jobs = [_named(way.job, cell) for way in group]
            try:
                answers: list[Placed] = yield call(cell, "place", jobs, place, onward)
            except (QueueUnavailable, QueueFull) as error:
                chunk.answers[group[0].index] = error
                continue
            chunk.take([way.index for way in group], answers)
            left += self._moved(chunk, group, answers)
        return left

    def _moved(
        self, chunk: _Chunk, group: Sequence[_Way], answers: Sequence[Placed]
    ) -> Iterator[_Way]:
        for way, answer in zip(group, answers, strict=False):
            if isinstance(answer, UnknownModel):
                self._health.learn(way.path[0][1], way.job.submission.options.model, False)
            if not isinstance(answer, Moved):
                continue
            try:
                self.check_named(answer.cell, way.job.submission.id)
            except QueueUnavailable as error:
                chunk.answers[way.index] = error
                continue
            serves = self._serves(way.job.submission.options.model)
            start = (answer.place, answer.cell)  # its place goes up: this ends
            way.path = self._cells.path(_text(way.job), serves, start)
            yield way


def _cell_in_id(job: Prepared) -> str | None:
    """The cell in the id of a job without a key, or None."""
    submission = job.submission
    return cell_of(submission.id) if submission.options.idempotency_key is None else None


def _text(job: Prepared) -> str:
    """What decides on the cell of a job: its key, or its id where it has none."""
    return codec.scoped_key(job.submission) or job.submission.id


def _named(job: Prepared, cell: str) -> Prepared:
    """A job with a key, whose id ends with the cell that records it. An own id is not changed."""
    submission = job.submission
    if cell_of(submission.id) in (None, cell):
        return job
    return replace(job, submission=replace(submission, id=id_in(submission.id, cell)))
