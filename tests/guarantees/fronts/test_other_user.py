"""Fronts of another user, as they ship: with Celery, S3, decoders and the demo model."""

import io
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from PIL import Image

from blipq import Client, Status
from blipq.local.supervisor import Service
from guarantees.fronts.parts import processes, serving
from stacks import local_stack
from worker.supervision.everybodys import python_for_all

pytestmark = [pytest.mark.guarantee, pytest.mark.root]

OTHER, GROUP = 65_534, 64_999


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path to which everybody can pass."""
    folder = Path(tempfile.mkdtemp(prefix="bq"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def test_fronts_of_another_user_take_fetch_and_decode_and_go_on_when_one_is_killed(
    folder: Path,
) -> None:
    stack = local_stack(folder / "stack")
    environment = stack.environment() | {
        "TMPDIR": str(folder),
        "BLIPQ_FRONTS": "2",
        "BLIPQ_FRONT_USER": f"{OTHER}:{GROUP}",
        "BLIPQ_DTYPE": "float32",
        "OMP_NUM_THREADS": "1",
    }
    command = [python_for_all(folder), "-P", "-m", "blipq_worker"]
    worker = Service("worker", command, env=environment, log=folder / "worker.log")
    stack.start()
    try:
        worker.start()
        with Client(stack.settings()) as client:
            picture = io.BytesIO()
            Image.new("RGB", (64, 48), "red").save(picture, "JPEG")
            image = client.storage.upload(picture.getvalue())
            first = client.caption(image).wait(90)
            assert first.status is Status.SUCCEEDED, worker.last_words(60)
            before = processes(worker, "front")
            for each in before:
                assert set(each.uids()) == {OTHER}
                assert set(each.gids()) == {GROUP}
            before[0].send_signal(signal.SIGKILL)
            jobs = [client.caption(image) for _ in range(8)]
            for job in jobs:
                assert job.wait(60).status is Status.SUCCEEDED, worker.last_words(60)
        assert {each.uids().real for each in processes(worker, "engine")} == {0}
        worker.signal(signal.SIGTERM)
        worker.wait(60)
        assert worker.exit_code == 0, worker.last_words(60)
        assert not list(folder.glob("blipq-worker-*"))
        assert serving(worker) == []
        assert not any(psutil.pid_exists(each.pid) for each in before)
    finally:
        worker.stop()
        stack.stop()
