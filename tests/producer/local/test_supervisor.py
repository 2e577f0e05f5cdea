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


@pytest.mark.root
def test_a_service_of_another_user_has_its_rights_alone_and_ends_with_its_parent(
    tmp_path: Path,
) -> None:
    """A change of user takes the signal away by which the kernel tells of a parent's death."""
    log = tmp_path / "log"
    code = f"""
import time
from pathlib import Path
from blipq.local.supervisor import Identity, Service
command = ["/bin/sh", "-c", "cat /proc/$$/status; echo written; exec sleep 60"]
identity = Identity(65534, 65533, (65533, 65532))
Service("other", command, log=Path({str(log)!r}), identity=identity).start()
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code]) as parent:
        try:
            wait_until(lambda: log.exists() and "written" in log.read_text(), "its status", 30)
        finally:
            parent.kill()
    found = dict(line.split(":\t", 1) for line in log.read_text().splitlines() if ":\t" in line)
    assert found["Uid"].split() == ["65534"] * 4
    assert found["Gid"].split() == ["65533"] * 4
    assert found["Groups"].split() == ["65532", "65533"]
    assert found["NoNewPrivs"] == "1"
    assert {int(found[name], 16) for name in ("CapPrm", "CapEff", "CapAmb")} == {0}
    wait_until(lambda: not Path(f"/proc/{found['Pid']}").exists(), "its end", 30)


def test_a_service_that_cannot_be_started_waits_before_it_is_tried_again(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\nexit 3\n")
    program.chmod(0o755)
    service = Service("gone", [str(program)], restarts=Backoff(3600.0, 3600.0))
    service.start()
    wait_until(lambda: service.exit_code == 3, "its end")
    program.unlink()
    service._started -= 7200
    with pytest.raises(FileNotFoundError):
        service.revive()
    assert not service.revive()
    assert service.exit_code == 3
