"""How a front's end is judged: by its own code, unless the main process chose the moment."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from blipq.backoff import Backoff
from blipq.local.supervisor import Identity, Service
from blipq.settings import Settings
from blipq_worker.fronts.holdings import Holding
from blipq_worker.fronts.user import FrontUser
from blipq_worker.supervision.environment import (
    engine_environment,
    engine_service,
    environment_of_user,
    front_environment,
)
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


def test_a_front_that_cannot_be_started_again_yet_does_not_end_its_worker(
    folder: RunFolder, tmp_path: Path
) -> None:
    """A user may have as many processes as it is allowed: then exec fails."""
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\nexit 3\n")
    program.chmod(0o755)
    service = Service("front 1", [str(program)], restarts=Backoff(0.0, 0.0))
    front = FrontProcess(service, 1, folder, cast(Settler, Settled()), watchdog_s=60)
    front.start()
    wait_until(lambda: front.exit_code == 3, "its end")
    os.rename(program, tmp_path / "moved")
    for _ in range(3):
        front.look()
        assert front.exit_code == 3
    os.rename(tmp_path / "moved", program)
    front.look()
    assert service._restarts == 4
    front.kill()
    folder.remove()


@pytest.mark.parametrize("plant", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/etc")])
def test_what_lies_where_a_fronts_files_should_ends_no_worker(
    folder: RunFolder, plant: Callable[[Path], None]
) -> None:
    service = Service("front 1", ["/bin/sh", "-c", "exit 3"], restarts=Backoff(0.0, 0.0))
    front = FrontProcess(service, 1, folder, cast(Settler, Settled()), watchdog_s=60)
    front.start()
    for path in (folder.status(1), folder.held(1)):
        path.unlink()
        plant(path)
    wait_until(lambda: front.exit_code == 3, "its end")
    assert front.status() is None
    front.look()
    front.kill()
    folder.remove()


def test_fronts_of_another_user_get_nothing_that_names_this_ones_home(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "/root")
    monkeypatch.setenv("HF_TOKEN", "hush-hub")
    user = FrontUser("4000:4000", Identity(4000, 4000, (4000,)), {"HOME": "/"})
    found = environment_of_user(user, Settings(), ())
    assert "/root" not in found.values()
    assert "hush-hub" not in found.values()
    assert found["HOME"] == "/"
    assert found["PATH"] == os.environ["PATH"]
    local = Settings.model_validate(
        {
            "redis_url": "redis://127.0.0.1:7000/0",
            "s3_endpoint_url": "http://127.0.0.1:7001",
            "s3_access_key_id": "key",
            "s3_secret_access_key": "secret",
            "endpoint_source": "local stack",
        }
    )
    found = environment_of_user(user, local, ("outputs", "more/prefix"))
    assert found["BLIPQ_REDIS_URL"] == "redis://127.0.0.1:7000/0"
    assert found["BLIPQ_S3_SECRET_ACCESS_KEY"] == "secret"
    assert found["BLIPQ_ALLOWED_OUTPUTS"] == "outputs,more/prefix"
    assert found["BLIPQ_STACK_FILE"] == os.devnull


def test_an_engine_keeps_compiled_code_out_of_reach_of_fronts_of_another_user(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's own default is a name in /tmp, which these could take first."""
    monkeypatch.setenv("XDG_CACHE_HOME", "/root/cache")
    user = FrontUser("4000:4000", Identity(4000, 4000, (4000,)), {"HOME": "/"})
    models = {"default": "demo"}
    assert "TORCHINDUCTOR_CACHE_DIR" not in engine_service(folder, models).env
    env = engine_service(folder, models, user=user).env
    assert env["TORCHINDUCTOR_CACHE_DIR"] == "/root/cache/blipq/inductor"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/own")
    assert engine_service(folder, models, user=user).env["TORCHINDUCTOR_CACHE_DIR"] == "/own"
    folder.remove()


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
