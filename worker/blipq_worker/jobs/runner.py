"""One message's way through the worker: claim, work, outcome."""

import logging
import time
from typing import Any

from blipq.contract import Kind
from blipq.errors import WorkError
from blipq.ledger.worker import Claim
from blipq.telemetry import names, tracing
from blipq.telemetry.logs import about
from blipq.telemetry.trace import NOTHING, Trace
from blipq_worker.claims import Lost
from blipq_worker.jobs.claiming import Claiming
from blipq_worker.jobs.errors import HandBack
from blipq_worker.jobs.execution import Execution
from blipq_worker.jobs.outcomes import Outcomes
from blipq_worker.jobs.quarantine import Draining, Gate
from blipq_worker.receipt import Stopwatch
from blipq_worker.startup import START

log = logging.getLogger(__name__)


class Runner:
    """Runs jobs: one call of ``run`` per message, each on a thread of its own."""

    def __init__(
        self, claiming: Claiming, execution: Execution, outcomes: Outcomes, gate: Gate
    ) -> None:
        self._claiming = claiming
        self._execution = execution
        self._outcomes = outcomes
        self._gate = gate

    def run(self, kind: Kind, id: str, request: Any = None, options: Any = None) -> None:
        """Runs the job of a message.

        ``request`` and ``options`` come in messages of foreign Celery clients: a job that the
        ledger does not know is recorded first. Raises JobFailedTask when the job failed, HandBack
        when the message must go back.
        """
        with about(id):
            self._run(kind, id, request, options)

    def _run(self, kind: Kind, id: str, request: Any, options: Any) -> None:
        try:
            with self._gate.shared():
                claim = self._claiming.claim(kind, id, request, options)
                if claim is None:
                    return
                if not claim.solo:
                    self._work(claim)
                    return
        except Draining:
            raise HandBack from None
        self._work_alone(claim)

    def _work_alone(self, claim: Claim) -> None:
        """It may have killed its worker: it runs after the others have left, and before any come.

        Its lease is renewed while it waits for them, and a crash until then is not its own.
        """
        try:
            with self._gate.alone():
                if self._claiming.begin(claim):
                    self._work(claim)
        except (Draining, HandBack):
            self._outcomes.hand_back(claim)
        finally:
            self._claiming.release(claim)

    def _work(self, claim: Claim) -> None:
        """Runs a claimed job to its outcome, or leaves it to whoever claims it next."""
        worker = self._claiming.worker
        trace = _begun(claim, worker)
        watch = Stopwatch(queue_ms=claim.queue_ms, worker=worker, trace=trace)
        with about(claim.id, trace.context), trace:
            self._work_watched(claim, watch)

    def _work_watched(self, claim: Claim, watch: Stopwatch) -> None:
        try:
            made = self._execution.result(claim, watch)
            self._outcomes.succeeded(claim, made.result, watch, result_uri=made.uri)
            START.job_succeeded(watch.run_ms / 1000)
        except Lost:
            self._outcomes.lost(claim, watch)
        except WorkError as error:
            self._outcomes.failed(claim, error, watch)
        finally:
            self._claiming.release(claim)


def _begun(claim: Claim, worker: str) -> Trace:
    """The span of a claimed job's run, beside one for its wait, which ends here."""
    if not claim.traceparent:
        return NOTHING
    since = time.time_ns() - round(claim.waited_ms * 1e6)
    tracing.continued(names.QUEUE, claim.traceparent, since_ns=since).end()
    attributes = names.of_message(names.PROCESS, "process", claim.queue, claim.id, claim.kind.value)
    attributes |= {
        names.MODEL_NAME: claim.model,
        names.ATTEMPT: claim.attempts,
        names.WORKER: worker,
    }
    name = f"{names.PROCESS} {claim.queue}"
    return tracing.continued(name, claim.traceparent, kind="consumer", attributes=attributes)
