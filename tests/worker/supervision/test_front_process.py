"""How a front's end is judged: by its own code, unless the main process chose the moment."""

import os
import signal
import sys
from pathlib import Path
from typing import cast

import pytest

from blipq.local.supervisor import Service
from blipq_worker.fronts.holdings import Holding
from blipq_worker.supervision.environment import engine_environment, front_environment
from blipq_worker.supervision.folder import RunFolder
from blipq_worker.supervision.front import FrontProcess
from blipq_worker.supervision.settling import Settler, verdicts
from conftest import wait_until

#: Holds a job that runs alone; stays, or ends after two seconds with the code that it is given.
FRONT = """
import sys, time
from pathlib import Path
from blipq.contract import Kind
from blipq.ledger.worker import Claim
from blipq_worker.fronts.holdings import Holdings
holdings = Holdings(Path(sys.argv[1]), 4)
holdings.take("job", Kind.CAPTION, "q")
holdings.claimed(Claim("job", Kind.CAPTION, "m", "q", "{}", "", "1-n", 1, 0, True, 0.0, 60.0))
time.sleep(60 if len(sys.argv) < 3 else 2)
sys.exit(int(sys.argv[2]))
"""


class Settled:
    """What was to be settled."""

    def __init__(self) -> None:
        self.verdicts: list[str] = []

    def settle(self, holdings: list[Holding], code: int) -> None:
        self.verdicts += verdicts(holdings, code)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.setenv("TMPDIR", "/tmp")
    return RunFolder()


def started(folder: RunFolder, settled: Settled, *arguments: str) -> FrontProcess:
    held = folder.held(1)
    service = Service("front 1", [sys.executable, "-c", FRONT, str(held), *arguments])
    front = FrontProcess(service, 1, folder, cast(Settler, settled), watchdog_s=60)
    front.start()
    wait_until(lambda: held.exists() and held.read_bytes()[2048:2049] == b"\x02", "its claim", 30)
    return front


def test_a_front_that_is_killed_when_its_time_to_drain_is_over_blames_nobody(
    folder: RunFolder,
) -> None:
    settled = Settled()
    started(folder, settled).kill()
    folder.remove()
    assert settled.verdicts == ["hand-back"]


def test_a_front_that_died_before_it_was_to_be_killed_is_judged_by_its_death(
    folder: RunFolder,
) -> None:
    settled = Settled()
    front = started(folder, settled)
    front.signal(signal.SIGSEGV)
    wait_until(lambda: front.exit_code is not None, "its death")
    front.kill()
    folder.remove()
    assert settled.verdicts == ["crash"]


def test_a_front_whose_settings_are_wrong_is_not_started_again(folder: RunFolder) -> None:
    """The main process ends with that code, which it could not see any more."""
    front = started(folder, Settled(), "78")
    wait_until(lambda: front.exit_code is not None, "its end")
    front.look()
    code = front.exit_code
    front.kill()
    folder.remove()
    assert code == 78


def test_the_engine_gets_no_key_however_its_variable_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    services = ("blipq_redis_url", "Blipq_S3_Secret_Access_Key", "aws_secret_access_key")
    for name in (*services, "Blipq_model_s3_secret_access_key"):
        monkeypatch.setenv(name, "hush")
    monkeypatch.setenv("blipq_device", "cpu")
    found = engine_environment({"default": "demo"})
    assert "hush" not in found.values()
    assert found["blipq_device"] == "cpu"
    assert found["PATH"] == os.environ["PATH"]


IN_S3 = {"default": "demo", "other": "owner/opt+s3://models/itm"}


def test_the_keys_of_models_in_s3_are_the_engines_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLIPQ_S3_ENDPOINT_URL", "http://s3.test:9000")
    monkeypatch.setenv("BLIPQ_S3_ACCESS_KEY_ID", "for-images")
    monkeypatch.setenv("BLIPQ_S3_SECRET_ACCESS_KEY", "hush-images")
    monkeypatch.setenv("BLIPQ_MODEL_S3_ACCESS_KEY_ID", "for-models")
    monkeypatch.setenv("BLIPQ_MODEL_S3_SECRET_ACCESS_KEY", "hush-models")
    monkeypatch.setenv("HF_TOKEN", "hush-hub")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-aws")
    monkeypatch.setenv("AWS_CA_BUNDLE", "/etc/ca.pem")
    engine = engine_environment(IN_S3)
    assert engine["BLIPQ_MODEL_S3_ENDPOINT_URL"] == "http://s3.test:9000"
    assert engine["BLIPQ_MODEL_S3_SECRET_ACCESS_KEY"] == "hush-models"
    assert engine["HF_TOKEN"] == "hush-hub"
    assert engine["AWS_CA_BUNDLE"] == "/etc/ca.pem"
    assert not {"hush-images", "hush-aws"} & set(engine.values())
    front = front_environment()
    assert {"hush-images", "hush-aws"} <= set(front.values())
    assert not {"hush-models", "for-models", "hush-hub"} & set(front.values())


def test_models_in_s3_are_read_as_images_are_where_nothing_else_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BLIPQ_S3_ACCESS_KEY_ID", "for-images")
    monkeypatch.setenv("BLIPQ_S3_SECRET_ACCESS_KEY", "hush-images")
    found = engine_environment(IN_S3)
    assert found["BLIPQ_MODEL_S3_ACCESS_KEY_ID"] == "for-images"
    assert found["BLIPQ_MODEL_S3_SECRET_ACCESS_KEY"] == "hush-images"
    assert "BLIPQ_S3_SECRET_ACCESS_KEY" not in found


def test_a_role_of_the_cloud_reaches_models_in_s3_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::1:role/worker")
    assert engine_environment(IN_S3)["AWS_ROLE_ARN"] == "arn:aws:iam::1:role/worker"
    assert "AWS_ROLE_ARN" not in engine_environment({"default": "demo"})
