"""Child processes that are started again."""

import sys

import pytest

from blipq.backoff import Backoff
from blipq.local import supervisor
from blipq.local.supervisor import Service
from conftest import wait_until


def test_a_service_has_pauses_of_its_own_between_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "RESTARTS", Backoff(3600.0, 3600.0))
    command = [sys.executable, "-c", "raise SystemExit(3)"]
    patient = Service("patient", command)
    eager = Service("eager", command, restarts=Backoff(0.01, 0.01))
    for service in (patient, eager):
        service.start()
    wait_until(lambda: patient.exit_code == 3, "its end")
    for _ in range(3):
        wait_until(eager.revive, "another start")
    assert not patient.revive()
    eager.stop()
