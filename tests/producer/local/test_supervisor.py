"""Child processes that are started again."""

import subprocess
import sys
from pathlib import Path

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


def test_a_service_of_another_user_has_its_groups_alone_and_ends_with_its_parent(
    tmp_path: Path,
) -> None:
    """A change of user takes the signal away by which the kernel tells of a parent's death."""
    code = f"""
import time
from pathlib import Path
from blipq.local.supervisor import Identity, Service
command = ["/bin/sh", "-c", "id -u; id -g; id -G; echo $$; exec sleep 60"]
log = Path({str(tmp_path / "log")!r})
Service("other", command, log=log, identity=Identity(65534, 65533, (65533, 65532))).start()
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code]) as parent:
        try:
            log = tmp_path / "log"
            wait_until(lambda: log.exists() and log.read_text().count("\n") == 4, "its words", 30)
            uid, gid, groups, pid = log.read_text().splitlines()
            assert (uid, gid, groups) == ("65534", "65533", "65533 65532")
            assert Path(f"/proc/{pid}").exists()
        finally:
            parent.kill()
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "its end", 30)
