"""What becomes of a claimed job: stored, tried again later, or given back."""

import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NoReturn

from blipq.contract import ErrorCode, JobError
from blipq.errors import PermanentError, TransientError, WorkError
from blipq.ledger.codec import Message
from blipq.ledger.worker import MAX_RETRIES, Claim, WorkerLedger
from blipq.telemetry import names
from blipq.transport.broker import Broker
from blipq_worker.claims import Held
from blipq_worker.images.s3_access import AccessRefused, S3Access
from blipq_worker.jobs.errors import EngineLost, JobFailedTask
from blipq_worker.jobs.outages import written
from blipq_worker.messages.envelope import encodable
from blipq_worker.process.metrics import Outcome, WorkerMetrics
from blipq_worker.process.usage import Usage
from blipq_worker.receipt import Stopwatch

log = logging.getLogger(__name__)

LONGEST_BACKOFF_S = 60.0
#: A thread takes no job for so long after S3 refused its worker.
REFUSED_PAUSE_S = 5.0
#: A job whose bucket alone refused its worker is tried again after so long.
PUT_OFF_S = 10.0
#: Longest that all that is held is given back.
HAND_BACK_FOR_S = 10.0


class Outcomes:
    """Records the outcomes of jobs, through outages of Redis."""

    def __init__(
        self,
        ledger: WorkerLedger,
        broker: Broker,
        held: Held,
        metrics: WorkerMetrics,
        access: S3Access,
        *,
        usage: Usage,
        retry_backoff_s: float,
    ) -> None:
        self._ledger = ledger
        self._broker = broker
        self._held = held
        self._metrics = metrics
        self._access = access
        self._usage = usage
        self._retry_backoff_s = retry_backoff_s

    def succeeded(
        self, claim: Claim, result: str, watch: Stopwatch, *, result_uri: str | None = None
    ) -> None:
        """Stores a result, or where it is."""
        receipt = watch.receipt()
        write = partial(self._ledger.succeed, claim, result, receipt, result_uri=result_uri)
        self._finish(write, claim, watch, "succeeded")

    def lost(self, claim: Claim, watch: Stopwatch) -> None:
        """Nobody waits for the job any more, or another worker has it."""
        log.info("%s: cancelled, expired or taken over", claim.id)
        self._count(claim, "lost", watch)

    def failed(self, claim: Claim, error: WorkError, watch: Stopwatch) -> None:
        """Fails the job, tries it later, or gives it back, whichever the error calls for.

        Raises JobFailedTask where it failed.
        """
        match error:
            case PermanentError():
                self._fail(claim, error, watch)
            case AccessRefused():
                self._refused_access(claim, error, watch)
            case EngineLost():
                self._lost_engine(claim, error)
            case TransientError():
                self._retry(claim, error, watch)

    def hand_back(self, claim: Claim, reason: str = "") -> None:
        """Gives a job back, uncounted, through an outage of Redis if need be.

        reason: why, as the JSON of an error, for who waits for the job.
        """
        if self._taken_back(claim, time.monotonic() + claim.expires_in, reason):
            self._broker.publish(_message(claim))

    def hand_back_all(self) -> int:
        """Gives every running job back, uncounted: another worker takes it at once.

        For HAND_BACK_FOR_S at most: the process may be about to end. What Redis has not taken by
        then stays held. Returns how many it took.
        """
        # First the open requests: an answer that comes in between is among the claims.
        requested = self._held.requested()
        return self._hand_back_each(self._held.claims(), requested)

    def hand_back_lost(self) -> None:
        """Gives back what runs on a device that is lost.

        Uncounted; but who may have broken it runs alone from now on, and who did run alone keeps
        its lease: when that runs out, it is a crash.
        """
        given, unanswered = [], self._held.requested()
        for claim in self._held.claims():
            requested = self._held.has_request(claim)
            if requested and claim.solo:
                log.error("%s: the device was lost while it ran alone", claim.id)
                continue
            if requested:
                self._held.suspect(claim)
            given.append(claim)
        self._hand_back_each(given, unanswered)

    def _fail(self, claim: Claim, error: WorkError, watch: Stopwatch) -> NoReturn:
        text = job_error(error.code, str(error), retryable=error.retryable)
        write = partial(self._ledger.fail, claim, text, watch.receipt())
        self._finish(write, claim, watch, "failed", error)
        raise JobFailedTask(f"{error.code}: {error}") from error

    def _retry(self, claim: Claim, error: TransientError, watch: Stopwatch) -> None:
        if claim.retries >= MAX_RETRIES:
            self._fail(claim, error, watch)
        pause = min(self._retry_backoff_s * 2**claim.retries, LONGEST_BACKOFF_S)
        pause *= random.uniform(0.5, 1.5)
        log.warning("%s: %s: again in %.1f s", claim.id, error, pause)
        text = job_error(error.code, str(error), retryable=True)
        write = partial(self._ledger.retry, claim, pause, text)
        self._finish(write, claim, watch, "retried", error)

    def _refused_access(self, claim: Claim, error: AccessRefused, watch: Stopwatch) -> None:
        """S3 refuses this worker, so the job is another's, or this one's later: uncounted."""
        reason = job_error(error.code, str(error), retryable=True)
        if self._access.is_refused(str(error)):
            self.hand_back(claim, reason)
            time.sleep(REFUSED_PAUSE_S)  # so that workers in order find it first
        elif error.lasting is not None:
            self._fail(claim, PermanentError(error.lasting, str(error)), watch)
        else:  # it is about this job's bucket alone: no thread waits for that
            log.warning("%s: %s: again in %g s", claim.id, error, PUT_OFF_S)
            put_off = partial(self._ledger.hand_back, claim, PUT_OFF_S, reason)
            self._finish(put_off, claim, watch, "handed_back")

    def _lost_engine(self, claim: Claim, error: EngineLost) -> None:
        """Gives a job back whose engine is gone: uncounted, since most jobs are not to blame.

        One that may have ended the engine runs alone from now on. One that did run alone keeps its
        lease: when that runs out, it is a crash.
        """
        if error.started and claim.solo:
            log.error("%s: the engine ended while it ran alone: %s", claim.id, error)
            return
        log.warning("%s: %s%s", claim.id, error, ": it may be why" if error.started else "")
        if error.started:  # also for who gives it back before this thread can, or in its place
            self._held.suspect(claim)
        self.hand_back(claim)

    def withdraw(self, requested: Mapping[str, str], until: float | None = None) -> list[Message]:
        """Takes claims back that were requested and whose answers have not come (nonce to id).

        Until then (monotonic), by default for HAND_BACK_FOR_S. Messages of what waits now.
        """
        if not requested:
            return []
        until = time.monotonic() + HAND_BACK_FOR_S if until is None else until
        withdraw = partial(self._ledger.withdraw, requested)
        return written(withdraw, ", ".join(requested.values()), until) or []

    def _hand_back_each(self, claims: Sequence[Claim], requested: Mapping[str, str]) -> int:
        """Gives jobs back; how many Redis took in time.

        requested: claims whose answers have not come yet (nonce to id); these are not counted.
        """
        until = time.monotonic() + HAND_BACK_FOR_S
        count, given = 0, []
        for claim in claims:
            taken = self._taken_back(claim, until)
            if taken is None:
                log.error("not handed back in time: %d", len(claims) - count)
                break
            count += 1
            if taken:
                given.append(_message(claim))
        given += self.withdraw(requested, until)
        if given:  # at once: a broker that hangs takes its time once, not for each of them
            self._broker.publish_all(given)
        return count

    def _taken_back(self, claim: Claim, until: float, reason: str = "") -> bool | None:
        """Whether a job went back uncounted; None if Redis did not answer ``until`` (monotonic).

        Only its answer lets go of the claim. A lease that ran out while this process lives would
        count as a crash.
        """
        is_suspect = self._held.is_suspect(claim)
        give = partial(self._ledger.hand_back, claim, error=reason, suspect=is_suspect)
        taken = written(give, claim.id, until)
        if taken is None:
            return None
        if not self._held.remove(claim):  # another thread gave it back meanwhile
            return False
        if taken:
            log.info("%s: handed back", claim.id)
            self._metrics.done(claim.kind, "handed_back", {}, model=claim.model)
        return taken

    def _finish(
        self,
        write: Callable[[], bool],
        claim: Claim,
        watch: Stopwatch,
        outcome: Outcome,
        error: WorkError | None = None,
    ) -> None:
        """Stores an outcome, through an outage of Redis if need be: until the job's deadline.

        The claim stays held meanwhile, so that its lease is renewed as soon as Redis is back.
        """
        with watch.trace.child(names.FINISH):
            stored = written(write, claim.id, time.monotonic() + claim.expires_in)
        if stored is None:
            log.error("%s: expired with its outcome not stored", claim.id)
            return
        if not stored:
            log.info("%s: its outcome came too late and is dropped", claim.id)
            outcome, error = "lost", None
        else:
            why = f": {error.code}: {error}" if error else ""
            log.info("%s: %s%s", claim.id, outcome.replace("_", " "), why)
        self._count(claim, outcome, watch, error.code if error else "")

    def _count(self, claim: Claim, outcome: Outcome, watch: Stopwatch, code: str = "") -> None:
        """Counts a job that has run here, and what it took of the device, whatever came of it."""
        watch.trace.set_attributes({names.OUTCOME: outcome})
        took, run_ms = watch.took, watch.run_ms
        self._metrics.done(
            claim.kind,
            outcome,
            took,
            code,
            model=claim.model,
            run_ms=run_ms,
            trace=watch.trace.context,
        )
        self._usage.add(claim, took, run_ms, succeeded=outcome == "succeeded")


def _message(claim: Claim) -> Message:
    return Message(claim.kind, claim.id, claim.queue)


def job_error(code: ErrorCode, message: str, *, retryable: bool = False) -> str:
    """An error as the ledger stores it."""
    error = JobError(code=code, message=encodable(message[:2000]), retryable=retryable)
    return error.model_dump_json()
