"""Everything blipq raises, in one tree.

    BlipqError
    ├── InvalidRequest (ValueError)       the request or an option is wrong
    │   ├── IdempotencyConflict           the key was used with another request
    │   └── UnknownModel                  no worker serves the model, or has lately; has .model
    ├── QueueUnavailable                  Redis or S3 did not answer in time; has .job_id
    ├── QueueFull                         too many open jobs, or Redis is out of memory
    │   └── TenantLimited                 the tenant has its limit; has .tenant, .limit, .most
    ├── SubmitStopped                     submit_many stopped; has .jobs, .index, .pending
    ├── JobNotFound (LookupError)         no such job, or its result is past keeping
    ├── ResultTimeout (TimeoutError)      not ended yet; the job goes on; has .job_id
    ├── JobEnded                          the job ended without a result
    │   ├── JobFailed                     has .code, .attempts
    │   ├── JobCancelled
    │   └── JobExpired
    └── WorkError                         raised on the worker while it runs a job
        ├── PermanentError                the same request would fail again
        └── TransientError                it may pass later: retried with backoff

Each class has ``retryable``: whether trying again, unchanged, can help.

    try:
        caption = job.result(timeout=30)
    except blipq.ResultTimeout:
        ...                               # still queued or running
    except blipq.JobFailed as failure:
        if failure.code == "image_not_found": ...
"""

from collections.abc import Sequence
from typing import Any

from blipq.contract import ErrorCode
from blipq.redaction import redacted


class BlipqError(Exception):
    """Base of everything blipq raises. Its message has no passwords in it."""

    retryable: bool = False

    def __init__(self, message: str = "") -> None:
        super().__init__(redacted(message))


class InvalidRequest(BlipqError, ValueError):
    """The request or one of its options is wrong; the message names the field."""


class IdempotencyConflict(InvalidRequest):
    """The idempotency key belongs to a job with another request."""


class UnknownModel(InvalidRequest):
    """No worker has served the model in the last 40 days, and no setting names it."""

    def __init__(self, message: str, model: str) -> None:
        super().__init__(message)
        self.model = model


class QueueUnavailable(BlipqError):
    """Redis or S3 did not answer in time.

    After a submit, the job may or may not have been recorded: submitting again with the same
    ``job_id`` (or idempotency key) cannot double it.
    """

    retryable = True

    def __init__(self, message: str, job_id: str | None = None) -> None:
        super().__init__(message)
        self.job_id = job_id


class QueueFull(BlipqError):
    """Too many jobs are open, or Redis has no memory left. Slow down and try again."""

    retryable = True


class TenantLimited(QueueFull):
    """A tenant has as many open jobs, or submits as many a second, as it may.

    ``limit``: ``open_jobs`` or ``rate``, and ``most`` its number. After ``retry_after_s`` seconds
    there may be room.
    """

    def __init__(
        self, tenant: str, limit: str, most: float, retry_after_s: float = 1.0, done: str = ""
    ) -> None:
        what = "have {:.10g} open jobs" if limit == "open_jobs" else "submit {:.10g} jobs a second"
        super().__init__(f"the tenant {tenant!r} may {what.format(most)} at the most{done}")
        self.tenant = tenant
        self.limit = limit
        self.most = most
        self.retry_after_s = retry_after_s


class SubmitStopped(BlipqError):
    """``submit_many`` stopped at request number ``index``; ``__cause__`` is the reason.

    ``jobs`` are those before it, all recorded. ``pending`` are the submissions that were taken and
    are not known to be recorded, the one that was refused among them. They keep their ids, so
    submitting them again cannot double a job: ``submit_many(chain(error.pending, the_rest))``.
    """

    def __init__(self, cause: BlipqError, jobs: Sequence[Any], pending: Sequence[Any]) -> None:
        super().__init__(f"stopped at request {len(jobs)}: {cause}")
        self.jobs = list(jobs)
        self.index = len(jobs)
        self.pending = list(pending)
        self.retryable = cause.retryable


class JobNotFound(BlipqError, LookupError):
    """No job has this id: it was never submitted, or its result is past its retention."""


class ResultTimeout(BlipqError, TimeoutError):
    """The job has not ended within the timeout. It goes on; wait again or cancel it."""

    retryable = True

    def __init__(self, message: str, job_id: str) -> None:
        super().__init__(message)
        self.job_id = job_id


class JobEnded(BlipqError):
    """The job ended without a result."""

    def __init__(self, message: str, job_id: str) -> None:
        super().__init__(message)
        self.job_id = job_id


class JobFailed(JobEnded):
    """The job failed; ``code`` is the reason, ``retryable`` whether another submit can help."""

    def __init__(
        self, message: str, job_id: str, *, code: ErrorCode, attempts: int, retryable: bool
    ) -> None:
        super().__init__(message, job_id)
        self.code = code
        self.attempts = attempts
        self.retryable = retryable


class JobCancelled(JobEnded):
    """The job was cancelled."""


class JobExpired(JobEnded):
    """The job's deadline passed before it was done."""


class WorkError(BlipqError):
    """What a worker raises while it runs a job; ``code`` becomes the job's error code."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class PermanentError(WorkError):
    """The same request would fail again: the job fails at once."""


class TransientError(WorkError):
    """The same request may pass later: the job is retried with backoff."""

    retryable = True
