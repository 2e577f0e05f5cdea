"""A producer's ledger over several cells, for an event loop."""

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from blipq.contract import JobInfo, Options
from blipq.errors import BlipqError
from blipq.ledger import codec
from blipq.ledger.async_producer import AsyncProducerLedger
from blipq.ledger.cells.calls import Calls, Round
from blipq.ledger.cells.fleet import Fleet
from blipq.ledger.changes import Changed, Chunk
from blipq.ledger.codec import Cancelled, Placed, Polled, Prepared, Recorded
from blipq.ledger.connection import connect_async, redis_errors
from blipq.ledger.erasure import Erased
from blipq.settings import Settings
from blipq.submission import Submission

T = TypeVar("T")


class AsyncCellLedger(AsyncProducerLedger):
    """The ledger of one cell of several."""

    async def place(self, jobs: Sequence[Prepared], place: int, onward: str) -> list[Placed]:
        """As ``CellLedger.place``."""
        with redis_errors(codec.only(job.submission.id for job in jobs)):
            arguments = codec.submit_arguments(jobs, self.settings, place, onward)
            answer = await self._run("submit", *arguments)
            return codec.placed(jobs, answer, self.settings.cell)

    async def reach(self, with_an_answer: bool) -> None:
        """As ``CellLedger.reach``."""
        with redis_errors():
            if with_an_answer:
                await self.redis.ping()
                return
            async with self.redis.client() as one:  # it has a connection of the pool
                connection: Any = one.connection
                # redis-py would notice a closed one at the next command, which may be sent then.
                reader = connection._reader
                if reader is None or reader.at_eof() or reader.exception() is not None:
                    await connection.disconnect()
                    await connection.connect()


class AsyncCellsLedger:
    """What ``AsyncProducer`` promises, on several cells: see ``Fleet``."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.fleet = Fleet(settings)
        each = {name: settings.in_cell(name) for name in self.fleet.cells.names}
        self.ledgers = {
            name: AsyncCellLedger(connect_async(own), own) for name, own in each.items()
        }

    async def _make(self, calls: Calls[T]) -> T:
        round = Round(calls, self.fleet.health)
        while round.call is not None:
            cell, on = round.call
            try:
                answer = await on(self.ledgers[cell])
            except BlipqError as error:
                round.failed(error)
            else:
                round.answered(answer)
        return round.answer

    def prepare(self, submission: Submission, *, notify: str) -> Prepared:
        """Makes a job ready to be recorded."""
        return codec.prepare(submission, self.settings, notify=notify)

    async def make_id(self, options: Options) -> str:
        """An id that ends with its cell."""
        made = self.fleet.make_id(options)
        return made if isinstance(made, str) else await self._make(made)

    async def submit(self, submission: Submission, *, notify: str) -> Recorded:
        """Records a job once."""
        (answer,) = await self.submit_all([self.prepare(submission, notify=notify)])
        if isinstance(answer, BlipqError):
            raise answer
        return answer

    async def submit_all(self, jobs: Sequence[Prepared]) -> list[Recorded | BlipqError]:
        """Records jobs, each once."""
        return await self._make(self.fleet.submit_all(jobs))

    async def check_models(self, models: Iterable[str]) -> None:
        """Raises UnknownModel if a job for one of these models would be refused."""
        await self._make(self.fleet.check_models(models))

    async def read(self, id: str) -> JobInfo | None:
        """A job as it is now; None for an unknown id."""
        return await self._make(self.fleet.read(id))

    async def poll(self, ids: Sequence[str], *, notify: str) -> Polled:
        """Which of these jobs have ended."""
        return await self._make(self.fleet.poll(ids, notify=notify))

    async def cancel(self, id: str) -> Cancelled:
        """Cancels a job."""
        return await self._make(self.fleet.cancel(id))

    async def pause(self, queue: str) -> int:
        """Lets no worker of any cell take a job from a queue."""
        return await self._make(self.fleet.pause(queue))

    async def resume(self, queue: str) -> int:
        """Lets workers take jobs from a queue again."""
        return await self._make(self.fleet.resume(queue))

    async def limit(self, tenant: str, open_jobs: int | None, rate: float | None) -> None:
        """Limits a tenant, in each cell."""
        await self._make(self.fleet.limit(tenant, open_jobs, rate))

    async def change(self, chunk: Chunk) -> Changed:
        """Makes one chunk of a change, of one cell after the other."""
        return await self._make(self.fleet.change(chunk))

    async def forget(
        self, ids: Sequence[str], *, erase: bool, only_ended: bool = False
    ) -> list[Erased]:
        """Ends jobs, or erases their records."""
        return await self._make(self.fleet.forget(ids, erase=erase, only_ended=only_ended))

    async def named(self, uris: Sequence[str]) -> set[str]:
        """Which of these images open jobs name."""
        return await self._make(self.fleet.named(uris))

    async def release(self, ids: Sequence[str]) -> int:
        """Deletes the records of jobs that have ended."""
        return await self._make(self.fleet.release(ids))

    async def aclose(self) -> None:
        """Closes the connections."""
        for each in self.ledgers.values():
            await each.aclose()
