"""Messages of others than this project's clients: whole jobs, malformed ones, and revokes."""

import logging
from typing import Any

from pydantic import ValidationError

from blipq.contract import ErrorCode, Kind, Options, Request, request_adapter
from blipq.errors import InvalidRequest, PermanentError
from blipq.ledger.keys import FOREIGN
from blipq.ledger.worker import WorkerLedger
from blipq.submission import Submission, checked, explain
from blipq_worker.jobs.outages import UNANSWERED
from blipq_worker.jobs.outcomes import job_error
from blipq_worker.messages.envelope import Malformed, WholeJob
from blipq_worker.process.metrics import WorkerMetrics

log = logging.getLogger(__name__)

#: The least time to a deadline that the ledger can count.
AT_ONCE_S = 0.001


class ForeignMessages:
    """Records what foreign messages mean in the ledger."""

    def __init__(self, ledger: WorkerLedger, metrics: WorkerMetrics) -> None:
        self._ledger = ledger
        self._metrics = metrics

    def receive(self, job: WholeJob) -> None:
        """Records a job as its message comes. Raises QueueUnavailable, QueueFull, RedisError."""
        self.adopt(job.kind, job.id, job.request, job.options)
        if job.delay_s:
            self._ledger.put_off(job.id, job.delay_s)

    def adopt(self, kind: Kind, id: str, request: Any, options: Any) -> None:
        """Records a job that a foreign client sent whole, or why it cannot be run.

        Raises QueueUnavailable, QueueFull, RedisError.
        """
        try:
            parsed = _parsed(_of_kind(kind, request) if isinstance(request, dict) else request)
            if not isinstance(options or {}, dict):
                raise InvalidRequest("options: must be an object")
            given = checked(Options, **(options or {}))
            recorded = self._ledger.submit(Submission(parsed, given, id), notify=FOREIGN)
            if isinstance(recorded, str) and recorded != id:
                raise InvalidRequest(f"idempotency_key: it is that of the job {recorded}")
        except UNANSWERED:
            raise
        except Exception as error:  # whatever it is, it is the message's fault
            log.warning("%s: %s", id, error)
            self._ledger.refuse(id, kind, job_error(ErrorCode.INVALID_REQUEST, str(error)))

    def refuse(self, message: Malformed) -> None:
        """Records a malformed message as a failed job, if it names one that is not known yet.

        Raises QueueUnavailable and QueueFull.
        """
        log.error("%s: %s", message.id or "a message without a job", message)
        if message.id is None:
            self._metrics.refused("dropped")
            return
        error = job_error(ErrorCode.INVALID_REQUEST, str(message))
        self._ledger.refuse(message.id, message.kind or Kind.CAPTION, error)
        self._metrics.refused("recorded")

    def cancel(self, id: str) -> bool:
        """Cancels a job that was revoked; False if the ledger does not know it or is away."""
        try:
            answer = self._ledger.cancel(id)
        except UNANSWERED as error:
            log.warning("%s: revoked, and not cancelled yet: %s", id, error)
            return False
        log.info("%s: revoked (%s)", id, answer)
        return answer != "unknown"

    def cancel_sent(self, kind: Kind, id: str, request: Any = None, options: Any = None) -> bool:
        """Cancels a revoked job whose message has come: it may not have been recorded yet.

        False if the ledger does not know it or is away.
        """
        try:
            if request is not None:
                self.adopt(kind, id, request, options)
        except UNANSWERED as error:
            log.warning("%s: revoked, and not recorded: %s", id, error)
        return self.cancel(id)

    def expire_sent(self, kind: Kind, id: str, request: Any = None, options: Any = None) -> None:
        """Records a job whose message had expired when it came, with a deadline that is over."""
        if request is None:  # the ledger has the job, and its deadline
            return
        if isinstance(options or {}, dict):
            options = {**(options or {}), "expires_in": AT_ONCE_S}
        try:
            log.info("%s: its message had expired", id)
            self.adopt(kind, id, request, options)
        except UNANSWERED as error:
            log.warning("%s: expired, and not recorded: %s", id, error)


def _of_kind(kind: Kind, request: dict[str, Any]) -> dict[str, Any]:
    """The request with the kind of its task. Raises InvalidRequest where it brings another one."""
    if (own := request.get("kind", kind)) != kind:
        raise InvalidRequest(f"request.kind: {own!r:.40} is not that of the task, {kind.value!r}")
    return {**request, "kind": kind}


def _parsed(value: Any) -> Request:
    try:
        return request_adapter.validate_python(value)
    except ValidationError as error:
        raise PermanentError(ErrorCode.INVALID_REQUEST, explain(error, Request)) from None
