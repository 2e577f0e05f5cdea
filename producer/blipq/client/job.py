"""A job's handle: an id and how to look it up."""

import asyncio
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing
from typing import Generic, Protocol, cast

from pydantic import ValidationError

from blipq.client.waiting import not_found
from blipq.contract import JobInfo, ResultT, Status, result_adapter
from blipq.errors import JobCancelled, JobExpired, JobFailed, JobNotFound, ResultTimeout
from blipq.ledger.protocols import AsyncProducer, Producer
from blipq.s3.refusals import Refusal, S3Refused
from blipq.s3.storage import Storage


class _Client(Protocol):
    """What a handle needs of a ``Client``."""

    @property
    def ledger(self) -> Producer: ...

    @property
    def storage(self) -> Storage: ...

    def outcomes(
        self, ids: Iterable[str], timeout: float | None = None, *, expires: float | None = None
    ) -> Iterator[JobInfo]: ...


class _AsyncClient(Protocol):
    """What a handle needs of an ``AsyncClient``."""

    @property
    def ledger(self) -> AsyncProducer: ...

    @property
    def storage(self) -> Storage: ...

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

        One that the ledger has given to S3 is read there. Raises ResultTimeout, JobNotFound (also
        where the result is kept no longer), JobFailed, JobCancelled or JobExpired.
        """
        info = self.wait(timeout)
        if is_elsewhere(info):
            info = fetched(info, self._client.storage)
        return cast(ResultT, result_of(info))

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
        info = await self.wait(timeout)
        if is_elsewhere(info):
            info = await asyncio.to_thread(fetched, info, self._client.storage)
        return cast(ResultT, result_of(info))

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


def is_elsewhere(info: JobInfo) -> bool:
    """Whether the result is in S3, and not in the ledger."""
    return info.result is None and info.result_uri is not None


def fetched(info: JobInfo, storage: Storage) -> JobInfo:
    """The job with its result from S3. Raises JobNotFound, S3Refused and S3Unavailable."""
    uri = cast(str, info.result_uri)
    try:
        result = result_adapter.validate_json(storage.read(uri))
    except S3Refused as error:
        if error.refusal is not Refusal.MISSING:
            raise
        raise JobNotFound(f"job {info.id} succeeded; its result is gone from {uri}") from error
    except ValidationError as error:
        raise JobNotFound(f"job {info.id} succeeded; what is at {uri} is no result") from error
    return info.model_copy(update={"result": result})


def result_of(info: JobInfo) -> object:
    """The result of a job that has ended.

    Raises JobFailed, JobCancelled, JobExpired, or JobNotFound where it is kept no longer.
    """
    if info.status is not Status.SUCCEEDED:
        raise _ending(info)
    if info.result is None:
        raise JobNotFound(f"job {info.id} succeeded: {info.note}")
    return info.result


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
