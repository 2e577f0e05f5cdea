"""A producer's ledger over several cells."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

from blipq.contract import JobInfo, Options
from blipq.errors import BlipqError
from blipq.ledger import codec
from blipq.ledger.cells.calls import Calls, Round
from blipq.ledger.cells.fleet import Fleet
from blipq.ledger.changes import Changed, Chunk
from blipq.ledger.codec import Cancelled, Placed, Polled, Prepared, Recorded
from blipq.ledger.connection import connect, redis_errors
from blipq.ledger.erasure import Erased
from blipq.ledger.producer import ProducerLedger
from blipq.settings import Settings
from blipq.submission import Submission

T = TypeVar("T")


class CellLedger(ProducerLedger):
    """The ledger of one cell of several."""

    def place(self, jobs: Sequence[Prepared], place: int, onward: str) -> list[Placed]:
        """Records jobs like ``submit_all``, but those whose place is another cell.

        place: of this cell on the jobs' way. onward: place and name of the next one, where the
        others go on to that this one does not know; "" records them here.
        """
        with redis_errors(codec.only(job.submission.id for job in jobs)):
            arguments = codec.submit_arguments(jobs, self.settings, place, onward)
            return codec.placed(jobs, self._run("submit", *arguments), self.settings.cell)

    def reach(self, with_an_answer: bool) -> None:
        """Raises QueueUnavailable where Redis cannot be reached. Nothing is sent to find that out.

        with_an_answer: it must answer, too.
        """
        with redis_errors():
            if with_an_answer:
                self.redis.ping()
                return
            # A connection of the pool: open still, or opened now.
            self.redis.client().close()  # type: ignore[no-untyped-call]


class CellsLedger:
    """What ``Producer`` promises, on several cells: see ``Fleet``."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.fleet = Fleet(settings)
        each = {name: settings.in_cell(name) for name in self.fleet.cells.names}
        self.ledgers = {name: CellLedger(connect(own), own) for name, own in each.items()}

    def _make(self, calls: Calls[T]) -> T:
        round = Round(calls, self.fleet.health)
        while round.call is not None:
            cell, on = round.call
            try:
                answer = on(self.ledgers[cell])
            except BlipqError as error:
                round.failed(error)
            else:
                round.answered(answer)
        return round.answer

    def prepare(self, submission: Submission, *, notify: str) -> Prepared:
        """Makes a job ready to be recorded."""
        return codec.prepare(submission, self.settings, notify=notify)

    def make_id(self, options: Options) -> str:
        """An id that ends with its cell."""
        made = self.fleet.make_id(options)
        return made if isinstance(made, str) else self._make(made)

    def submit(self, submission: Submission, *, notify: str) -> Recorded:
        """Records a job once."""
        (answer,) = self.submit_all([self.prepare(submission, notify=notify)])
        if isinstance(answer, BlipqError):
            raise answer
        return answer

    def submit_all(self, jobs: Sequence[Prepared]) -> list[Recorded | BlipqError]:
        """Records jobs, each once."""
        return self._make(self.fleet.submit_all(jobs))

    def check_models(self, models: Iterable[str]) -> None:
        """Raises UnknownModel if a job for one of these models would be refused."""
        self._make(self.fleet.check_models(models))

    def read(self, id: str) -> JobInfo | None:
        """A job as it is now; None for an unknown id."""
        return self._make(self.fleet.read(id))

    def poll(self, ids: Sequence[str], *, notify: str) -> Polled:
        """Which of these jobs have ended."""
        return self._make(self.fleet.poll(ids, notify=notify))

    def cancel(self, id: str) -> Cancelled:
        """Cancels a job."""
        return self._make(self.fleet.cancel(id))

    def pause(self, queue: str) -> int:
        """Lets no worker of any cell take a job from a queue."""
        return self._make(self.fleet.pause(queue))

    def resume(self, queue: str) -> int:
        """Lets workers take jobs from a queue again."""
        return self._make(self.fleet.resume(queue))

    def limit(self, tenant: str, open_jobs: int | None, rate: float | None) -> None:
        """Limits a tenant, in each cell."""
        self._make(self.fleet.limit(tenant, open_jobs, rate))

    def change(self, chunk: Chunk) -> Changed:
        """Makes one chunk of a change, of one cell after the other."""
        return self._make(self.fleet.change(chunk))

    def forget(self, ids: Sequence[str], *, erase: bool, only_ended: bool = False) -> list[Erased]:
        """Ends jobs, or erases their records."""
        return self._make(self.fleet.forget(ids, erase=erase, only_ended=only_ended))

    def named(self, uris: Sequence[str]) -> set[str]:
        """Which of these images open jobs name."""
        return self._make(self.fleet.named(uris))

    def release(self, ids: Sequence[str]) -> int:
        """Deletes the records of jobs that have ended."""
        return self._make(self.fleet.release(ids))

    def close(self) -> None:
        """Closes the connections."""
        for each in self.ledgers.values():
            each.close()
