"""Messages of foreign clients for models that do not exist end on record, not in a lost list."""

import json
from typing import Any

import pytest
import redis
from celery import Celery

from blipq import Client, Settings
from blipq.ledger.connection import connect
from blipq.ledger.worker import WorkerLedger
from blipq_worker.messages.strays import Strays


@pytest.fixture
def raw(apart: Settings) -> Any:
    with connect(apart) as raw:
        yield raw


@pytest.fixture
def undeclared(apart: Settings, raw: "redis.Redis") -> WorkerLedger:
    """A worker's ledger: its settings name no models."""
    return WorkerLedger(raw, apart.model_copy(update={"known_models": ()}))


def sweep(ledger: WorkerLedger) -> None:
    strays = Strays(ledger, ledger.settings, "w1")
    strays.tick()
    while strays._cursor:
        strays.tick()


def message(id: str, task: str = "blipq.caption") -> str:
    body = json.dumps([[id, {"image": "s3://photos/cat.jpg"}], {}, {}])
    return json.dumps({"headers": {"lang": "js", "task": task, "id": id}, "body": body})


def test_a_message_for_an_unknown_model_ends_in_a_failed_record(
    undeclared: WorkerLedger, raw: "redis.Redis"
) -> None:
    undeclared.register("w1", ["default"], "{}", ttl_s=60, spare=False)
    lists = ("blipq.ghost.normal", "blipq.gh.ost.high", "blipq.ghost.low\x06\x169")
    for number, name in enumerate(lists):
        raw.lpush(name, message(f"job_{number}"))
    sweep(undeclared)
    for number, model in enumerate(("ghost", "gh.ost", "ghost")):
        info = undeclared.read(f"job_{number}")
        assert info is not None
        assert (info.status, info.model, info.kind) == ("failed", model, "caption")
        assert info.error is not None
        assert info.error.code == "invalid_request"
        assert "'default' (1 live worker)" in info.error.message
    assert not raw.exists(*lists)


def test_a_celery_of_ones_own_leaves_no_binding_behind(
    undeclared: WorkerLedger, raw: "redis.Redis", apart: Settings
) -> None:
    with Celery(broker=apart.redis_url, set_as_current=False) as app:
        app.send_task("blipq.vqa", args=["job_1", {}], task_id="job_1", queue="blipq.ghost.normal")
    assert raw.exists("_kombu.binding.blipq.ghost.normal")
    sweep(undeclared)
    info = undeclared.read("job_1")
    assert info is not None
    assert info.status == "failed"
    assert not raw.exists("_kombu.binding.blipq.ghost.normal", "blipq.ghost.normal")


def test_messages_of_known_models_wait_for_their_workers(
    undeclared: WorkerLedger, raw: "redis.Redis"
) -> None:
    undeclared.register("w1", ["opt"], "{}", ttl_s=0.01, spare=False)
    for name in ("blipq.default.normal", "blipq.opt.low"):
        raw.lpush(name, message("job_1"))
    raw.lpush("somebody.elses.list", "{}")
    sweep(undeclared)
    assert raw.exists("blipq.default.normal", "blipq.opt.low", "somebody.elses.list") == 3
    assert undeclared.read("job_1") is None


def test_a_job_that_a_client_recorded_keeps_its_message_until_it_ends(
    undeclared: WorkerLedger, raw: "redis.Redis", apart: Settings
) -> None:
    """The producers' settings name a model that those of this worker do not."""
    with Client(apart) as client:
        job = client.caption("s3://photos/cat.jpg", model="nobody")
        sweep(undeclared)
        assert raw.llen("blipq.nobody.normal") == 1
        job.cancel()
        sweep(undeclared)
        assert raw.llen("blipq.nobody.normal") == 0
        assert job.status() == "cancelled"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no JSON",
        "{}",
        "[]",
        "3",
        "[" * 100_000,
        message("job_1", task="x.y"),
        message(""),
        message("\ud800"),
    ],
)
def test_what_is_no_message_of_ours_is_dropped(
    undeclared: WorkerLedger, raw: "redis.Redis", text: str
) -> None:
    raw.lpush("blipq.ghost.normal", text)
    sweep(undeclared)
    assert not raw.exists("blipq.ghost.normal")


def test_one_worker_at_a_time_sweeps(undeclared: WorkerLedger, raw: "redis.Redis") -> None:
    sweep(undeclared)
    raw.lpush("blipq.ghost.normal", message("job_1"))
    Strays(undeclared, undeclared.settings, "w2").tick()
    assert raw.llen("blipq.ghost.normal") == 1


def test_a_broker_that_cannot_be_listed_is_left_alone(undeclared: WorkerLedger) -> None:
    settings = undeclared.settings.model_copy(update={"broker_url": "amqp://127.0.0.1:1//"})
    Strays(undeclared, settings, "w1").tick()
