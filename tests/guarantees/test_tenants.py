"""A tenant at its limit is refused, and no other, while workers die and jobs come back."""

import signal
import threading
import time
from typing import Any

from blipq import Client, Job, TenantLimited
from blipq.ledger.operator import OperatorLedger
from conftest import wait_until
from guarantees.rig import Rig

MOST_OPEN = 12
THREADS = 4
SECONDS = 6.0


class Tenant:
    """A tenant whose producers submit as fast as they may."""

    def __init__(self, rig: Rig, name: str, pause_s: float) -> None:
        self.jobs: list[Job[Any]] = []
        self.refused: list[TenantLimited] = []
        self._rig, self._name, self._pause_s = rig, name, pause_s
        self._until = time.monotonic() + SECONDS
        self._threads = [threading.Thread(target=self._submit) for _ in range(THREADS)]
        for each in self._threads:
            each.start()

    def submits(self) -> bool:
        return any(each.is_alive() for each in self._threads)

    def join(self) -> None:
        for each in self._threads:
            each.join()

    def _submit(self) -> None:
        settings = self._rig.settings.model_copy(update={"tenant": self._name})
        with Client(settings) as client:
            while time.monotonic() < self._until:
                try:
                    self.jobs.append(client.caption(self._rig.image, "sleep 0.05"))
                except TenantLimited as error:
                    self.refused.append(error)
                time.sleep(self._pause_s)


def test_a_tenant_has_no_more_open_jobs_than_it_may_while_its_workers_are_killed(
    rig: Rig,
) -> None:
    rig.client.limit("shop", open_jobs=MOST_OPEN)
    worker = rig.start_worker(max_batch_size=2)
    shop, zoo = Tenant(rig, "shop", 0.01), Tenant(rig, "zoo", 0.5)
    most, killed = 0, False
    while shop.submits():
        most = max(most, _open(rig.operator).get("shop", 0))
        if not killed and len(shop.jobs) > 2 * MOST_OPEN:
            worker.signal(signal.SIGSTOP)
            if killed := rig.running() > 0:
                rig.kill(worker)
                rig.start_worker(max_batch_size=2)
            else:
                worker.signal(signal.SIGCONT)
        time.sleep(0.02)
    shop.join()
    zoo.join()
    assert killed
    assert most == MOST_OPEN
    assert {(each.tenant, each.most) for each in shop.refused} == {("shop", MOST_OPEN)}
    assert zoo.refused == []
    rig.all_succeed(shop.jobs + zoo.jobs)
    wait_until(lambda: _open(rig.operator) == {"shop": 0}, "no open jobs to be counted")
    assert max(job.info().attempts for job in shop.jobs + zoo.jobs) > 1, "the kill met no job"


def _open(operator: OperatorLedger) -> dict[str, int]:
    return {each.tenant: each.open for each in operator.tenants()}
