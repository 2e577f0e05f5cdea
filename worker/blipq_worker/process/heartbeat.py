"""Renews leases, says that the worker lives, and ends a process that hangs."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from blipq.errors import BlipqError
from blipq.ledger.worker import WorkerLedger
from blipq_worker.claims import Held
from blipq_worker.process.periodic import Periodic
from blipq_worker.process.registration import Registration, State
from blipq_worker.process.usage import Usage

log = logging.getLogger(__name__)

#: A worker whose model or decoder hangs, or whose device is lost, ends with this code: its
#: supervisor starts it again.
EXIT_HUNG = 70

LONGEST_BEAT_S = 2.0


def beat_s(lease_s: float) -> float:
    """How often leases are renewed."""
    return min(LONGEST_BEAT_S, lease_s / 5)


def live_s(beat_s: float) -> float:
    """How long a worker counts as live after a beat: two may be missed."""
    return 2.5 * beat_s


class LeaseBeat(Periodic):
    """Renews the leases, and ends a process that hangs.

    The two belong together: a lease must not be renewed where nothing makes progress.
    """

    def __init__(
        self,
        ledger: WorkerLedger,
        held: Held,
        *,
        usage: Usage,
        lease_s: float,
        watchdog_s: float,
        stalled_for: Callable[[], float],
    ) -> None:
        super().__init__("blipq-heartbeat", beat_s(lease_s))
        self._ledger = ledger
        self._held = held
        self._usage = usage
        self._lease_s = lease_s
        self._watchdog_s = watchdog_s
        self._stalled_for = stalled_for
        self._problem: str | None = None

    @property
    def problem(self) -> str | None:
        """Why the last beat did not reach the ledger, or None."""
        return self._problem

    def tick(self) -> None:
        """One beat. Raises what the ledger raises."""
        self._watch()
        try:
            self._beat()
        except Exception as error:
            self._problem = str(error)
            raise
        self._problem = None

    def stop(self) -> None:
        """Stops the thread, and says what the last jobs took."""
        super().stop()
        with suppress(BlipqError):
            self._usage.flush(self._ledger)

    def _beat(self) -> None:
        """What a beat does in Redis. Raises what the ledger raises."""
        self._renew()
        self._usage.flush(self._ledger)

    def _renew(self) -> int:
        """Renews the leases; how many claims are held."""
        claims = self._held.claims()
        if claims:
            tokens = {claim.id: claim.token for claim in claims}
            # Listed by claim: a job may have been given back and claimed anew since the call.
            lost = set(self._ledger.renew(tokens, lease_s=self._lease_s))
            self._held.lose(claim for claim in claims if claim.id in lost)
        return len(claims)

    def _watch(self) -> None:
        stalled = self._stalled_for()
        if stalled > self._watchdog_s:
            log.critical("the model or a decoder has made no progress for %.0f s: ending", stalled)
            logging.shutdown()
            os._exit(EXIT_HUNG)


class Heartbeat(LeaseBeat):
    """Also says that the worker lives.

    ``taking``: whether a message that comes now would be run at once. ``decode_bound``: looked at
    once a beat. ``decoding``: how texts are written, by model.
    """

    def __init__(
        self,
        ledger: WorkerLedger,
        held: Held,
        worker: str,
        models: Sequence[str],
        *,
        usage: Usage,
        outputs: Sequence[str] = (),
        threads: int,
        lease_s: float,
        grace_s: float,
        watchdog_s: float,
        stalled_for: Callable[[], float],
        taking: Callable[[], bool],
        draining: Callable[[], bool],
        decode_bound: Callable[[], bool] = lambda: False,
        decoding: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(
            ledger,
            held,
            usage=usage,
            lease_s=lease_s,
            watchdog_s=watchdog_s,
            stalled_for=stalled_for,
        )
        self._models = list(models)
        self._threads = threads
        self._taking = taking
        self._draining = draining
        self._decode_bound = decode_bound
        self._decoding = dict(decoding or {})
        self._registration = Registration(
            ledger, worker, outputs=outputs, grace_s=grace_s, ttl_s=live_s(self._interval_s)
        )

    def start(self) -> None:
        """Registers the worker before it takes messages: who reads its line "ready" finds it there.

        Where Redis is away, a later beat registers it.
        """
        self.turn()
        super().start()

    def _beat(self) -> None:
        active = self._renew()
        state = State(self._threads, active, self._taking(), self._draining(), self._decode_bound())
        self._registration.renew(self._models, state, decoding=self._decoding)
        self._usage.flush(self._ledger)
