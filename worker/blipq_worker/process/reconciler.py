"""Brings back the jobs of workers that died."""

import logging

from blipq.ledger.worker import Turn, WorkerLedger
from blipq.transport.broker import Broker
from blipq_worker.process.heartbeat import beat_s
from blipq_worker.process.periodic import Periodic

log = logging.getLogger(__name__)


LONGEST_TURN_S = 5.0


class Reconciler(Periodic):
    """Publishes again what a crash, a lost message or a backoff left behind.

    One worker at a time does it; the turn of a dead one ends by itself.
    """

    def __init__(
        self, ledger: WorkerLedger, broker: Broker, worker: str, *, lease_s: float, grace_s: float
    ) -> None:
        super().__init__("blipq-reconciler", min(1.0, lease_s / 4))
        self._ledger = ledger
        self._broker = broker
        # An outage that ends no turn is too short to end a lease.
        ttl_s = min(LONGEST_TURN_S, lease_s / 2)
        # Live workers renew within a beat that is under way, and fails, and the next one. Longer
        # than a lease nobody waits for the jobs of a sweeper that died: its turn ends first.
        patience_s = min(ledger.settings.timeout_s + 2 * beat_s(lease_s), lease_s - ttl_s)
        self._turn = Turn(worker, ttl_s=ttl_s, patience_s=patience_s)
        self._grace_s = grace_s

    def tick(self) -> None:
        """One sweep, if it is our turn: a chunk at a time, until nothing is due."""
        more = True
        while more and not self._stop.is_set():
            more = self._sweep()

    def _sweep(self) -> bool:
        """One chunk; whether more may be due."""
        swept = self._ledger.reconcile(grace_s=self._grace_s, turn=self._turn)
        if swept.messages:
            log.info("published again: %d", len(swept.messages))
            self._broker.publish_all(swept.messages)
        return swept.more
