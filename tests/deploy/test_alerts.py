"""Each alert fires from the fault that it is about, on a real Prometheus."""

import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import pytest
from PIL import Image
from tools.deploy.alerts import ALERTS

from blipq import Client, Settings
from blipq.local.supervisor import Service
from conftest import wait_until
from deploy.scraping import Fleet
from receivers import receiving

pytestmark = [pytest.mark.programs, pytest.mark.timeout(240)]

#: The side of a picture that takes a third of a second to decode, and no time to fetch.
LARGE = 6000


@contextmanager
def no_worker(fleet: Fleet) -> Iterator[None]:
    """A job waits for a model that nobody serves."""
    settings = fleet.rig.settings.model_copy(update={"known_models": ("nobody",)})
    with Client(settings) as client:
        job = client.caption(fleet.rig.image, model="nobody")
        yield
        job.cancel()


@contextmanager
def failures(fleet: Fleet) -> Iterator[None]:
    """Pictures are gone."""
    fleet.start_worker()
    fleet.rig.all_succeed(fleet.rig.submit_all(["did"] * 3))
    for seen in (1, 2):  # a counter's first sample is no increase
        missing = f"s3://{fleet.rig.settings.inbox_bucket}/missing.png"
        fleet.rig.client.caption(missing).wait(30)
        fleet.sees(f'blipq_worker_jobs_total{{outcome="failed"}} == {seen}')
    yield


@contextmanager
def dead_letters(fleet: Fleet) -> Iterator[None]:
    """A job ends every worker that takes it."""
    fleet.sees("blipq_dead_letters == 0")
    fleet.rig.submit("exit")
    while not fleet.rig.operator.dead():
        worker = fleet.rig.launch_worker()
        wait_until(partial(_ended, worker, fleet), "the worker's death, or the job's", timeout=60)
    yield


def _ended(worker: Service, fleet: Fleet) -> bool:
    return worker.exit_code is not None or fleet.rig.operator.dead() > 0


@contextmanager
def stall(fleet: Fleet) -> Iterator[None]:
    """A pass does not end, until its worker is ended."""
    worker = fleet.start_worker()
    job = fleet.rig.submit("hang")
    yield
    job.cancel()
    fleet.rig.kill(worker)


@contextmanager
def refused_by_the_canary(fleet: Fleet) -> Iterator[None]:
    """A model has gone wrong: its jobs fail, and so does its check."""
    worker = fleet.start_worker(device="nonsense", max_batch_size=1)
    fleet.sees("blipq_worker_canary_passed == 1")
    jobs = fleet.rig.submit_all(["did"] * 8)
    fleet.sees("blipq_worker_canary_passed == 0")
    yield
    fleet.rig.kill(worker)
    for job in jobs:
        job.cancel()


@contextmanager
def slow_decoding(fleet: Fleet) -> Iterator[None]:
    """Pictures are large, and one is decoded at a time, for a model that takes no time at all."""
    fleet.start_worker(decode_threads=1, concurrency=4)
    data = io.BytesIO()
    Image.new("RGB", (LARGE, LARGE), "red").save(data, "PNG")
    image = fleet.rig.client.storage.upload(data.getvalue())
    jobs = [fleet.rig.client.caption(image, f"did {number}") for number in range(300)]
    yield
    for job in jobs:
        job.cancel()


@contextmanager
def webhooks_without_a_sender(fleet: Fleet) -> Iterator[None]:
    """A job has ended whose webhook nobody sends."""
    with receiving() as receiver, _hooked(fleet, receiver.url):
        yield


@contextmanager
def webhooks_refused(fleet: Fleet) -> Iterator[None]:
    """A receiver refuses an event, in all of the attempts."""
    fleet.sees("blipq_webhooks_dead == 0")
    with receiving(lambda got: 500) as receiver, _hooked(fleet, receiver.url):
        fleet.start_sender(webhook_allow="127.0.0.1", webhook_ladder="0,0.1")
        yield


@contextmanager
def _hooked(fleet: Fleet, url: str) -> Iterator[None]:
    fields = {**fleet.rig.settings.model_dump(), "webhook_allow": "127.0.0.1"}
    with Client(Settings.model_validate(fields)) as client:
        job = client.caption(fleet.rig.image, "did", webhook={"url": url})
        fleet.start_worker()
        job.wait(30)
        yield


@contextmanager
def redis_away(fleet: Fleet) -> Iterator[None]:
    """Redis is killed, and comes back."""
    fleet.sees("blipq_ledger_up == 1")
    fleet.rig.kill_redis()
    yield
    fleet.rig.start_redis()


@contextmanager
def redis_full(fleet: Fleet) -> Iterator[None]:
    """Redis holds four fifths of what it may."""
    fleet.sees("blipq_redis_memory_bytes")
    used = fleet.rig.redis(lambda raw: raw.info("memory")["used_memory"])
    before = fleet.rig.redis(lambda raw: raw.config_get("maxmemory")["maxmemory"])
    fleet.rig.redis(lambda raw: raw.config_set("maxmemory", int(used / 0.8)))
    yield
    fleet.rig.redis(lambda raw: raw.config_set("maxmemory", before))


@contextmanager
def another_kind_of_machine(fleet: Fleet) -> Iterator[None]:
    """Jobs of one shape take ten times as long as before."""
    fleet.start_worker(max_batch_size=1)
    for _ in range(2):  # what the first ones took predicts the others
        fleet.rig.all_succeed(fleet.rig.submit_all(["sleep 0.2"] * 3))
        fleet.sees("blipq_gpu_seconds_total")
    fleet.sees("blipq_prediction_error_ratio < 0.5")
    fleet.rig.all_succeed(fleet.rig.submit_all(["sleep 2"] * 5))
    yield


FAULTS: Mapping[str, Callable[[Fleet], AbstractContextManager[None]]] = {
    "BlipqNoWorkers": no_worker,
    "BlipqOldJobs": no_worker,
    "BlipqDeadLetters": dead_letters,
    "BlipqFailures": failures,
    "BlipqStalled": stall,
    "BlipqEngineAway": refused_by_the_canary,
    "BlipqDecodeBound": slow_decoding,
    "BlipqWebhooksDead": webhooks_refused,
    "BlipqNoSender": webhooks_without_a_sender,
    "BlipqLedgerDown": redis_away,
    "BlipqRedisMemory": redis_full,
    "BlipqPredictionOff": another_kind_of_machine,
}
#: Those that end with their fault. Others look back for minutes.
ENDING = {
    *("BlipqNoWorkers", "BlipqOldJobs", "BlipqStalled", "BlipqEngineAway"),
    *("BlipqLedgerDown", "BlipqRedisMemory"),
}


@pytest.mark.parametrize("alert", FAULTS)
def test_an_alert_fires_from_its_fault_until_that_has_ended(fleet: Fleet, alert: str) -> None:
    fleet.sees("blipq_ledger_up")
    with FAULTS[alert](fleet):
        wait_until(lambda: fleet.prometheus.fires(alert), "the alert", timeout=60)
    if alert in ENDING:
        wait_until(lambda: not fleet.prometheus.fires(alert), "its end", timeout=60)


def test_each_alert_has_a_fault() -> None:
    assert set(FAULTS) == {alert.name for alert in ALERTS}
