"""A job's handle: an id and how to look it up."""

import threading
import time
from typing import TYPE_CHECKING, Generic, TypeVar, cast

from blipq.contract import JobInfo, Result, Status
from blipq.errors import (
    JobCancelled,
    JobExpired,
    JobFailed,
    JobNotFound,
    QueueUnavailable,
    ResultTimeout,
)

if TYPE_CHECKING:
    from blipq.client import Client

ResultT = TypeVar("ResultT", bound=Result, covariant=True)

#: While waiting, the record is also read this often: a lost notification only delays.
FIRST_POLL_S, LAST_POLL_S = 0.05, 1.0


class Job(Generic[ResultT]):
    """One request to the model, from submit to outcome. Holds nothing but its id."""

    __slots__ = ("_client", "id")

    def __init__(self, id: str, client: "Client") -> None:
        self.id = id
        self._client = client

    def __repr__(self) -> str:
        return f"<blipq.Job {self.id}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Job) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)

    def info(self) -> JobInfo:
        """The job as it is now. Raises JobNotFound."""
        info = self._client.ledger.read(self.id)
        if info is None:
            raise JobNotFound(f"no job {self.id}: never submitted, or past its retention")
        return info

    @property
    def status(self) -> Status:
        """Where the job is now. Raises JobNotFound."""
        return self.info().status

    def wait(self, timeout: float | None = None) -> JobInfo:
        """Waits for the job to end and returns it, however it ended.

        ``timeout`` is in seconds; without one, the job's own deadline bounds the wait. Redis may go
        away and come back meanwhile. Raises ResultTimeout, JobNotFound, and QueueUnavailable if
        Redis still does not answer when the time is up.
        """
        ending = None if timeout is None else time.monotonic() + timeout
        with self._client.notifier.watch(self.id, self._channel) as told:
            return self._poll(told, timeout, ending)

    outcome = wait

    def result(self, timeout: float | None = None) -> ResultT:
        """The job's result, waiting for it like ``wait``.

        Raises ResultTimeout, JobNotFound, JobFailed, JobCancelled or JobExpired.
        """
        info = self.wait(timeout)
        if info.status is Status.SUCCEEDED and info.result is not None:
            return cast(ResultT, info.result)
        raise _ending(info)

    def cancel(self) -> bool:
        """Cancels the job at once, wherever it is; False if it had ended. Raises JobNotFound."""
        answer = self._client.ledger.cancel(self.id)
        if answer == "unknown":
            raise JobNotFound(f"no job {self.id}: never submitted, or past its retention")
        return answer == "cancelled"

    def _channel(self) -> str | None:
        return self._client.ledger.notify_channel_of(self.id)

    def _poll(self, told: threading.Event, timeout: float | None, ending: float | None) -> JobInfo:
        pause = FIRST_POLL_S
        while True:
            info, down = self._try_info()
            if info is not None and info.ended:
                return info
            left = LAST_POLL_S if ending is None else ending - time.monotonic()
            if left <= 0:
                raise down or ResultTimeout(_still_open(cast(JobInfo, info), timeout), self.id)
            told.wait(min(pause, left))
            told.clear()
            pause = min(pause * 1.5, LAST_POLL_S)

    def _try_info(self) -> tuple[JobInfo | None, QueueUnavailable | None]:
        try:
            return self.info(), None
        except QueueUnavailable as error:
            return None, error


def _still_open(info: JobInfo, timeout: float | None) -> str:
    text = f"job {info.id} is still {info.status} after {timeout:g} s"
    if info.live_workers == 0:
        text += f": no live worker serves the model {info.model!r}"
    return text


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
