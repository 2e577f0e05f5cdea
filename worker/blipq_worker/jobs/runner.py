"""One message's way through the worker: claim, work, outcome."""

import logging
from typing import Any

from blipq.contract import Kind
from blipq.errors import WorkError
from blipq.ledger.worker import Claim
from blipq_worker.claims import Lost
from blipq_worker.jobs.claiming import Claiming
from blipq_worker.jobs.errors import HandBack
from blipq_worker.jobs.execution import Execution
from blipq_worker.jobs.outcomes import Outcomes
from blipq_worker.jobs.quarantine import Draining, Gate
from blipq_worker.receipt import Stopwatch

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
        watch = Stopwatch(queue_ms=claim.queue_ms, worker=self._claiming.worker)
        try:
            made = self._execution.result(claim, watch)
            self._outcomes.succeeded(claim, made.result, watch, result_uri=made.uri)
        except Lost:
            self._outcomes.lost(claim, watch)
        except WorkError as error:
            self._outcomes.failed(claim, error, watch)
        finally:
            self._claiming.release(claim)
