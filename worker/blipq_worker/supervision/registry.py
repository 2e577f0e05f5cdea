"""Says that a worker with fronts lives: one entry for all of its processes."""

from blipq.ledger.worker import WorkerLedger
from blipq_worker.process.heartbeat import beat_s, live_s
from blipq_worker.process.periodic import Periodic
from blipq_worker.process.registration import Registration
from blipq_worker.settings import WorkerSettings
from blipq_worker.supervision.state import Whole


class Registry(Periodic):
    """Renews the worker's entry, from when its engine has first served.

    The leases are their fronts' to renew.
    """

    def __init__(
        self,
        ledger: WorkerLedger,
        worker: str,
        options: WorkerSettings,
        whole: Whole,
        *,
        grace_s: float,
    ) -> None:
        super().__init__("blipq-registry", beat_s(options.lease_s))
        self._whole = whole
        self._is_hurried = False
        self._problem: str | None = "the worker is not registered yet"
        self._registration = Registration(
            ledger,
            worker,
            outputs=options.allowed_outputs,
            grace_s=grace_s,
            ttl_s=live_s(self._interval_s),
        )

    @property
    def problem(self) -> str | None:
        """Why the last beat did not reach the ledger; None once one has."""
        return self._problem

    def look(self) -> None:
        """Has the worker registered as soon as its engine has served."""
        if self._whole.engine.models and not self._is_hurried:
            self._is_hurried = True
            self.hurry()

    def tick(self) -> None:
        """One beat. Raises what the ledger raises."""
        engine = self._whole.engine
        if not engine.models:
            return
        try:
            self._registration.renew(
                list(engine.models),
                self._whole.state(),
                engine=engine.state,
                fronts=self._whole.live_fronts(),
                decoding={name: info.way for name, info in engine.models.items()},
            )
        except Exception as error:
            self._problem = str(error)
            raise
        self._problem = None
