"""Uploads while what makes jobs of them, what runs those, and Redis go away."""

import os
import threading
import time
from collections.abc import Iterator

import pytest

from blipq.contract import CaptionRequest
from conftest import wait_until
from guarantees.rig import Rig
from guarantees.soak.uploads import Uploads
from sqs import Sqs

#: Scaled down; GUARANTEES_OUTAGE_S=20 shows the real one.
OUTAGE_S = float(os.environ.get("GUARANTEES_OUTAGE_S", "4"))


@pytest.fixture
def sqs() -> Iterator[Sqs]:
    with Sqs() as sqs:
        yield sqs


@pytest.mark.parametrize("source", ["queue", "listing"])
def test_each_upload_has_one_sidecar_whatever_is_killed(rig: Rig, sqs: Sqs, source: str) -> None:
    uploads = Uploads(rig, 40, sqs if source == "queue" else None)
    with uploads.running():
        for number in range(uploads.objects):
            uploads.upload(number)
            if number in (10, 20, 30):
                uploads.kill("watch")
            if number == 20:
                uploads.kill("worker")
        uploads.wait(timeout=90)
    assert uploads.audit() == dict.fromkeys(uploads.audit(), 0)


def test_an_outage_of_redis_loses_nothing_and_hangs_nobody(rig: Rig, sqs: Sqs) -> None:
    """In the middle of a watch, of submit_many and of result."""
    uploads = Uploads(rig, 10, sqs)
    submitted, results = [], []
    with uploads.running():
        wait_until(lambda: rig.operator.workers(), "the worker", timeout=60)
        request = CaptionRequest.model_validate({"image": rig.image, "prompt": "fine"})

        def slowly() -> Iterator[CaptionRequest]:
            for _ in range(400):
                time.sleep(0.01)
                yield request

        def submit_many() -> None:
            submitted.extend(rig.client.submit_many(slowly(), timeout=60))

        def result() -> None:
            results.append(rig.submit("sleep 2").result(timeout=60))

        threads = [threading.Thread(target=each) for each in (submit_many, result)]
        for thread in threads:
            thread.start()
        for number in range(5):
            uploads.upload(number)
        rig.kill_redis()
        for number in range(5, 10):
            uploads.upload(number)
        time.sleep(OUTAGE_S)
        rig.start_redis()
        for thread in threads:
            thread.join(timeout=90)
            assert not thread.is_alive()
        uploads.wait(timeout=90)
        rig.all_succeed(submitted)
    assert len(submitted) == 400
    assert [result.text for result in results] == ["did sleep 2"]
    assert uploads.audit() == dict.fromkeys(uploads.audit(), 0)
