"""A job's handle: an id and how to look it up."""

from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing
from typing import Generic, Protocol, cast

from blipq.client.waiting import not_found
from blipq.contract import JobInfo, ResultT, Status
from blipq.errors import JobCancelled, JobExpired, JobFailed, ResultTimeout
from blipq.ledger.protocols import AsyncProducer, Producer


class _Client(Protocol):
    """What a handle needs of a ``Client``."""

    @property
    def ledger(self) -> Producer: ...

    def outcomes(
        self, ids: Iterable[str], timeout: float | None = None, *, expires: float | None = None
    ) -> Iterator[JobInfo]: ...


class _AsyncClient(Protocol):
    """What a handle needs of an ``AsyncClient``."""

    @property
    def ledger(self) -> AsyncProducer: ...

    def outcomes(
        self, ids: Iterable[str], timeout: float | None = None, *, expires: float | None = None
    ) -> AsyncGenerator[JobInfo]: ...


class _Handle:
    """What every handle is: an id. One of a job that has ended also knows how it ended.

    The handle that a submit returned knows when the job expires, on the clock of ``monotonic``.
    """

    __slots__ = ("_ended", "_expires", "id")

    def __init__(self, id: str, ended: JobInfo | None = None, expires: float | None = None) -> None:
        self.id = id
        self._expires = expires
        self._ended = ended

    def __repr__(self) -> str:
        return f"<blipq.{type(self).__name__} {self.id}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Handle) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)


class Job(_Handle, Generic[ResultT]):
    """One request to the model, from submit to outcome."""

    __slots__ = ("_client",)

    def __init__(
        self,
        id: str,
        client: _Client,
        ended: JobInfo | None = None,
        expires: float | None = None,
    ) -> None:
        super().__init__(id, ended, expires)
        self._client = client

    def info(self) -> JobInfo:
        """The job as it is now. Raises JobNotFound."""
        info = self._ended or self._client.ledger.read(self.id)
        if info is None:
            raise not_found(self.id)
        return info

    def status(self) -> Status:
        """The job's status now. Raises JobNotFound."""
        return self.info().status

    def wait(self, timeout: float | None = None) -> JobInfo:
        """Waits for the job to end and returns it, however it ended.

        ``timeout`` is in seconds; without one, the job's own deadline bounds the wait. Redis may go
        away and come back meanwhile. Raises ResultTimeout, JobNotFound, and QueueUnavailable if
        Redis still does not answer when the time is up. Where the deadline is not known, as with
        ``Client.job(id)`` and a Redis that never answers, it is ``default_expires_in`` from now.
        """
        if self._ended is not None:
            return self._ended
        try:
            return next(self._client.outcomes([self.id], timeout, expires=self._expires))
        except ResultTimeout as error:
            info = self.info()
            if info.ended:
                return info
            raise ResultTimeout(still_open(info, timeout), self.id) from error

    outcome = wait

    def result(self, timeout: float | None = None) -> ResultT:
        """The job's result, waiting for it like ``wait``.

        Raises ResultTimeout, JobNotFound, JobFailed, JobCancelled or JobExpired.
        """
        return cast(ResultT, result_of(self.wait(timeout)))

    def cancel(self) -> bool:
        """Cancels the job at once, wherever it is; False if it had ended. Raises JobNotFound."""
        answer = self._client.ledger.cancel(self.id)
        if answer == "unknown":
            raise not_found(self.id)
        return answer == "cancelled"


class AsyncJob(_Handle, Generic[ResultT]):
    """One request to the model, from submit to outcome: ``Job`` for an event loop."""

    __slots__ = ("_client",)

    def __init__(
        self,
        id: str,
        client: _AsyncClient,
        ended: JobInfo | None = None,
        expires: float | None = None,
    ) -> None:
        super().__init__(id, ended, expires)
        self._client = client

    async def info(self) -> JobInfo:
        """The job as it is now. Raises JobNotFound."""
        info = self._ended or await self._client.ledger.read(self.id)
        if info is None:
            raise not_found(self.id)
        return info

    async def status(self) -> Status:
        """The job's status now. Raises JobNotFound."""
        return (await self.info()).status

    async def wait(self, timeout: float | None = None) -> JobInfo:
        """Waits for the job to end and returns it, like ``Job.wait``."""
        if self._ended is not None:
            return self._ended
        try:
            ending = self._client.outcomes([self.id], timeout, expires=self._expires)
            async with aclosing(ending) as outcomes:
                return await anext(outcomes)
        except ResultTimeout as error:
            info = await self.info()
            if info.ended:
                return info
            raise ResultTimeout(still_open(info, timeout), self.id) from error

    outcome = wait

    async def result(self, timeout: float | None = None) -> ResultT:
        """The job's result, waiting for it, like ``Job.result``."""
        return cast(ResultT, result_of(await self.wait(timeout)))

    async def cancel(self) -> bool:
        """Cancels the job at once, wherever it is; False if it had ended. Raises JobNotFound."""
        answer = await self._client.ledger.cancel(self.id)
        if answer == "unknown":
            raise not_found(self.id)
        return answer == "cancelled"


def last_expiry(jobs: Iterable[_Handle]) -> float | None:
    """When the last of these jobs expires; None if that is not known of each."""
    times = [job._expires for job in jobs]
    return None if None in times else max(cast("list[float]", times), default=None)


def still_open(info: JobInfo, timeout: float | None) -> str:
    """Why there is no result yet."""
    text = f"job {info.id} is still {info.status} after {timeout:g} s"
    if info.note is not None:
        text += f": {info.note}"
    if info.last_error is not None:
        text += f"; it is tried again after {info.last_error.code}: {info.last_error.message}"
    return text


def result_of(info: JobInfo) -> object:
    """The result of a job that has ended. Raises JobFailed, JobCancelled or JobExpired."""
    if info.status is Status.SUCCEEDED and info.result is not None:
        return info.result
    raise _ending(info)


def _ending(info: JobInfo) -> Exception:
    if info.status is Status.CANCELLED:
        return JobCancelled(f"job {info.id} was cancelled", info.id)
    if info.status is Status.EXPIRED:
        return JobExpired(f"job {info.id} passed its deadline before it was done", info.id)
    error = info.error
    assert error is not None, "a failed job has an error"
    return JobFailed(
        f"{error.code}: {error.message}",
        info.id,
        code=error.code,
        attempts=info.attempts,
        retryable=error.retryable,
    )
