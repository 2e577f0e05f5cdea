"""What clients need of a ledger. ``blipq.testing`` has implementations without Redis."""

from collections.abc import Iterable, Sequence
from typing import Protocol

from blipq.contract import JobInfo, Options
from blipq.errors import BlipqError
from blipq.ledger.changes import Changed, Chunk
from blipq.ledger.codec import Cancelled, Polled, Prepared, Recorded
from blipq.ledger.erasure import Erased
from blipq.submission import Submission


class Producer(Protocol):
    """A producer's ledger. Whatever needs Redis raises QueueUnavailable and QueueFull.

    ``notify`` is the id of the client process that is notified when a job ends.
    """

    def prepare(self, submission: Submission, *, notify: str) -> Prepared:
        """Makes a job ready to be recorded. Raises InvalidRequest for a forbidden URL."""

    def make_id(self, options: Options) -> str:
        """An id for a new job. With cells it names one that can be reached, if any can."""

    def submit(self, submission: Submission, *, notify: str) -> Recorded:
        """Records a job once: the message to publish, or the id of the job that exists already.

        The same id or idempotency key with the same request is the same job; with another one it
        raises IdempotencyConflict. Raises UnknownModel, too.
        """

    def submit_all(self, jobs: Sequence[Prepared]) -> list[Recorded | BlipqError]:
        """Records jobs, each once and in order, in one round trip.

        Answers like ``submit`` for each job, up to the first that is refused: its answer is the
        error (IdempotencyConflict, UnknownModel, QueueFull or TenantLimited), and later jobs are
        not recorded.
        """

    def check_models(self, models: Iterable[str]) -> None:
        """Raises UnknownModel if a job for one of these models would be refused."""

    def read(self, id: str) -> JobInfo | None:
        """A job as it is now, expired if its deadline has passed; None for an unknown id."""

    def poll(self, ids: Sequence[str], *, notify: str) -> Polled:
        """Which of these jobs have ended, in one round trip; expires those past their deadline."""

    def cancel(self, id: str) -> Cancelled:
        """Cancels a job at once, whether it waits or runs."""

    def pause(self, queue: str) -> int:
        """Lets no worker take a job from a queue until it is resumed; how many jobs wait in it.

        Raises InvalidRequest for what is no queue, and UnknownModel.
        """

    def resume(self, queue: str) -> int:
        """Lets workers take jobs from a queue again; how many wait. Raises as ``pause``."""

    def limit(self, tenant: str, open_jobs: int | None, rate: float | None) -> None:
        """Limits a tenant's open jobs, and the jobs that it may submit a second; None is no limit.

        ``*`` is all that have no limits of their own. Without both it has none of its own. Raises
        InvalidRequest.
        """

    def change(self, chunk: Chunk) -> Changed:
        """Makes one chunk of a change of many jobs."""

    def forget(self, ids: Sequence[str], *, erase: bool, only_ended: bool = False) -> list[Erased]:
        """Ends those of some jobs that are open, or erases them all; those that are known.

        At most ``erasure.CHUNK`` at once. ``only_ended``: open ones stay, and are not returned.
        None of those that are returned is tried again.
        """

    def named(self, uris: Sequence[str]) -> set[str]:
        """Which of these images open jobs name."""

    def release(self, ids: Sequence[str]) -> int:
        """Deletes the records of ended jobs whose outcome the caller keeps; returns how many.

        Dead letters stay, and jobs with a webhook event that is not delivered yet.
        """

    def close(self) -> None:
        """Closes the connections."""


class AsyncProducer(Protocol):
    """``Producer`` for an event loop."""

    def prepare(self, submission: Submission, *, notify: str) -> Prepared:
        """As ``Producer.prepare``: it needs no Redis."""

    async def make_id(self, options: Options) -> str:
        """As ``Producer.make_id``."""

    async def submit(self, submission: Submission, *, notify: str) -> Recorded:
        """As ``Producer.submit``."""

    async def submit_all(self, jobs: Sequence[Prepared]) -> list[Recorded | BlipqError]:
        """As ``Producer.submit_all``."""

    async def check_models(self, models: Iterable[str]) -> None:
        """As ``Producer.check_models``."""

    async def read(self, id: str) -> JobInfo | None:
        """As ``Producer.read``."""

    async def poll(self, ids: Sequence[str], *, notify: str) -> Polled:
        """As ``Producer.poll``."""

    async def cancel(self, id: str) -> Cancelled:
        """As ``Producer.cancel``."""

    async def pause(self, queue: str) -> int:
        """As ``Producer.pause``."""

    async def resume(self, queue: str) -> int:
        """As ``Producer.resume``."""

    async def limit(self, tenant: str, open_jobs: int | None, rate: float | None) -> None:
        """As ``Producer.limit``."""

    async def change(self, chunk: Chunk) -> Changed:
        """As ``Producer.change``."""

    async def forget(
        self, ids: Sequence[str], *, erase: bool, only_ended: bool = False
    ) -> list[Erased]:
        """As ``Producer.forget``."""

    async def named(self, uris: Sequence[str]) -> set[str]:
        """As ``Producer.named``."""

    async def release(self, ids: Sequence[str]) -> int:
        """As ``Producer.release``."""

    async def aclose(self) -> None:
        """Closes the connections."""
