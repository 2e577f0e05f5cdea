"""From a message to the claim of its job."""

import logging
import time
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from blipq.contract import Kind
from blipq.errors import QueueFull
from blipq.ledger.worker import Claim, Unclaimed, WorkerLedger, new_nonce
from blipq_worker.claims import Held
from blipq_worker.jobs.errors import HandBack
from blipq_worker.jobs.foreign import ForeignMessages
from blipq_worker.jobs.outages import LAST_PAUSE_S, UNAVAILABLE, until_answered
from blipq_worker.jobs.outcomes import Outcomes

log = logging.getLogger(__name__)


class Claiming:
    """Takes jobs for this worker.

    served: the models that it serves, by name. stopping: whether it takes no more jobs.
    """

    def __init__(
        self,
        ledger: WorkerLedger,
        held: Held,
        foreign: ForeignMessages,
        outcomes: Outcomes,
        *,
        worker: str,
        lease_s: float,
        served: Collection[str],
        stopping: Callable[[], bool],
    ) -> None:
        self._ledger = ledger
        self._held = held
        self._foreign = foreign
        self._outcomes = outcomes
        self.worker = worker
        self._lease_s = lease_s
        self._served = served
        self._stopping = stopping

    def claim(self, kind: Kind, id: str, request: Any, options: Any) -> Claim | None:
        """Takes the job, or None if there is nothing to do. Raises HandBack."""
        claim = self._asked(id)
        if claim == "unknown" and request is not None:
            self._adopt(kind, id, request, options)
            claim = self._asked(id)
        if claim == "newer":
            # It stays queued: the reconciler publishes it again, until a newer worker takes it.
            log.warning("%s: its contract is newer than this worker's: left in the queue", id)
            return None
        if not isinstance(claim, Claim):
            log.info("%s: nothing to do (%s)", id, claim)
            return None
        if claim.model not in self._served:
            # A foreign client's message, in the queue of another model than its job is for.
            log.info("%s: not served here, goes to its queue: %s", id, claim.queue)
            self._outcomes.hand_back(claim)
            self._held.remove(claim)
            return None
        return claim

    def begin(self, claim: Claim) -> bool:
        """Whether a job that waited to run alone is this worker's still. Raises HandBack."""
        return until_answered(partial(self._ledger.begin, claim), self._stopping)

    def release(self, claim: Claim) -> None:
        """Lets a claim go, whatever became of it."""
        self._held.remove(claim)

    def _asked(self, id: str) -> Claim | Unclaimed:
        """The ledger's answer to a claim, which is held from then on.

        An answer that was lost may have been a claim: it is requested again under its nonce. Raises
        HandBack if the worker stops meanwhile; the claim is withdrawn then.
        """
        nonce = new_nonce()
        call = partial(self._ledger.claim, id, self.worker, lease_s=self._lease_s, nonce=nonce)
        with self._held.asking(id, nonce):
            # Only now: what is requested before the gate closes is seen by who closes it.
            if self._stopping():
                raise HandBack
            try:
                claim = until_answered(call, self._stopping)
            except HandBack:
                self._outcomes.withdraw({nonce: id})
                raise
            if isinstance(claim, Claim):
                self._held.add(claim)
        return claim

    def _adopt(self, kind: Kind, id: str, request: Any, options: Any) -> None:
        adopt = partial(self._foreign.adopt, kind, id, request, options)
        try:
            until_answered(adopt, self._stopping, UNAVAILABLE)
        except QueueFull as error:  # there is room when jobs end, which needs this thread
            time.sleep(LAST_PAUSE_S)
            raise HandBack from error
