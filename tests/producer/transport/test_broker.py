"""Publishing never holds its caller up, and loses nothing that is recorded."""

import json
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import redis

from blipq import CaptionRequest, Client, Priority, Settings
from blipq.contract import CONTRACT, Kind
from blipq.errors import IdempotencyConflict
from blipq.ledger.codec import Message
from blipq.ledger.keys import queues_of
from blipq.transport.broker import PUBLISH_TIMEOUT_S, Broker
from blocking import BlockingClient

MESSAGE = Message(Kind.CAPTION, "job_1", "blipq.default.normal")
NOWHERE = "redis://127.0.0.1:1/0"
REQUEST = CaptionRequest(image="s3://uploads/cat.jpg")


def test_a_message_carries_the_id_and_the_contract(
    apart: Settings, raw_redis: "redis.Redis"
) -> None:
    broker = Broker(apart)
    assert broker.publish(MESSAGE)
    message = json.loads(raw_redis.lindex("blipq.default.normal", 0))
    assert message["headers"]["task"] == "blipq.caption"
    assert message["headers"]["id"] == "job_1"
    assert message["headers"]["contract"] == CONTRACT
    assert len(json.dumps(message)) < 700, "no more than a worker needs"
    assert message["properties"]["delivery_info"]["routing_key"] == "blipq.default.normal"
    broker.close()


@pytest.mark.parametrize("opened", [Client, BlockingClient])
def test_a_job_is_published_with_its_record_as_kombu_would(
    apart: Settings, raw_redis: "redis.Redis", opened: Callable[..., Any]
) -> None:
    with opened(apart) as client:
        (job,) = client.submit_many([REQUEST])
        broker = client.broker if opened is Client else Broker(apart)
        assert broker.publish(Message(Kind.CAPTION, job.id, "blipq.default.normal"))
        published = raw_redis.lrange("blipq.default.normal", 0, -1)
        by_kombu, by_the_ledger = map(json.loads, published)
        assert by_kombu["properties"].pop("delivery_tag")
        assert by_the_ledger["properties"].pop("delivery_tag")
        assert by_the_ledger == by_kombu
        broker.close()


def test_a_submit_that_records_no_job_publishes_none(
    apart: Settings, raw_redis: "redis.Redis"
) -> None:
    with Client(apart) as client:
        client.submit(REQUEST, id="job_1")
        client.submit(REQUEST, id="job_1")
        with pytest.raises(IdempotencyConflict):
            client.submit(CaptionRequest(image="s3://uploads/dog.jpg"), id="job_1")
    assert raw_redis.llen("blipq.default.normal") == 1


def test_a_list_that_refuses_messages_fails_no_submit(
    apart: Settings, raw_redis: "redis.Redis", caplog: pytest.LogCaptureFixture
) -> None:
    raw_redis.set("blipq.default.normal", "no list")
    with Client(apart) as client, caplog.at_level(logging.WARNING, logger="blipq"):
        jobs = [client.submit(REQUEST), *client.submit_many([REQUEST] * 20)]
        assert {job.status() for job in jobs} == {"queued"}
    assert "the broker does not take messages" in caplog.text
    assert raw_redis.zcard("blipq:open") == 21


def test_many_messages_keep_their_order(apart: Settings, raw_redis: "redis.Redis") -> None:
    broker = Broker(apart)
    ids = [f"job_{number}" for number in range(20)]
    assert broker.publish_all([Message(Kind.VQA, id, "blipq.default.low") for id in ids])
    queued = [json.loads(text) for text in raw_redis.lrange("blipq.default.low", 0, -1)]
    assert [message["headers"]["id"] for message in reversed(queued)] == ids
    broker.close()


def test_many_messages_need_few_round_trips(apart: Settings, raw_redis: "redis.Redis") -> None:
    broker = Broker(apart)
    broker.publish(MESSAGE)
    raw_redis.config_resetstat()
    assert broker.publish_all([MESSAGE] * 100)
    assert raw_redis.info("commandstats")["cmdstat_lpush"]["calls"] == 100
    assert raw_redis.info("stats")["total_reads_processed"] < 30, "one pipeline"
    broker.close()


def test_a_kombu_without_batches_publishes_one_by_one(
    apart: Settings, raw_redis: "redis.Redis", monkeypatch: pytest.MonkeyPatch
) -> None:
    """kombu before 5.7, which a service may have: its import failed, and nothing was published."""
    monkeypatch.delattr("kombu.messaging.Producer.batch")
    monkeypatch.delattr("kombu.exceptions.BatchPublishError")
    broker = Broker(apart)
    assert broker.publish_all([MESSAGE] * 5)
    assert raw_redis.llen("blipq.default.normal") == 5
    broker.close()


def test_a_dropped_connection_loses_no_message(apart: Settings, raw_redis: "redis.Redis") -> None:
    broker = Broker(apart)
    assert broker.publish(MESSAGE)
    raw_redis.client_kill_filter(_type="normal", skipme=True)
    raw_redis.delete("blipq.default.normal")
    assert broker.publish_all([MESSAGE] * 5)
    assert raw_redis.llen("blipq.default.normal") >= 5
    broker.close()


def test_a_broker_that_is_down_is_told_in_time(apart: Settings) -> None:
    broker = Broker(apart.model_copy(update={"broker_url": NOWHERE}))
    started = time.monotonic()
    assert not broker.publish(MESSAGE)
    assert time.monotonic() - started < PUBLISH_TIMEOUT_S + 3
    broker.close()


def test_a_submit_succeeds_when_only_the_message_is_lost(apart: Settings) -> None:
    with Client(apart.model_copy(update={"broker_url": NOWHERE})) as client:
        job = client.caption("s3://uploads/cat.jpg")
        assert job.status() == "queued"


class Broken(Exception):
    """What no list of exceptions names: each transport has some of its own."""


@pytest.mark.parametrize("opened", [Client, BlockingClient])
@pytest.mark.parametrize("error", [Broken("at amqp://u:hush@host"), TypeError("heartbeat")])
def test_no_exception_of_a_publisher_reaches_who_submits(
    apart: Settings,
    error: Exception,
    opened: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A TypeError came out of submit behind a job that was recorded: its id was lost."""

    def put(self: Broker, producer: Any, message: Message, *, declares: bool) -> None:
        raise error

    monkeypatch.setattr(Broker, "_put", put)
    apart = apart.model_copy(update={"broker_url": "memory://"})
    with opened(apart) as client, caplog.at_level(logging.WARNING, logger="blipq"):
        for job in (client.caption("s3://uploads/cat.jpg"), *client.submit_many([REQUEST] * 2)):
            assert job.info().status == "queued"
    told = [each.message for each in caplog.records if each.name == "blipq.transport.broker"]
    assert [type(error).__name__ in each for each in told] == [True]
    assert "hush" not in caplog.text


@pytest.mark.parametrize("opened", [Client, BlockingClient])
@pytest.mark.parametrize("url", ["amqp://host//?bogus=1", "nothing://host", "sqs://"])
def test_a_job_is_returned_whatever_is_wrong_with_the_broker(
    apart: Settings, opened: Callable[..., Any], url: str
) -> None:
    with opened(apart.model_copy(update={"broker_url": url})) as client:
        assert client.caption("s3://uploads/cat.jpg").info().status == "queued"


def test_a_thread_that_cannot_be_started_costs_no_job(
    apart: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with Client(apart) as client:
        monkeypatch.setattr(threading.Thread, "start", start)
        job = client.caption("s3://uploads/cat.jpg")
        assert job.info().status == "queued"


def test_the_first_submits_of_several_threads_are_all_published(
    apart: Settings, raw_redis: "redis.Redis"
) -> None:
    with Client(apart) as client, ThreadPoolExecutor(8) as threads:
        images = [f"s3://uploads/{number}.jpg" for number in range(16)]
        jobs = list(threads.map(client.caption, images))
    queued = [json.loads(text) for text in raw_redis.lrange("blipq.default.normal", 0, -1)]
    assert {message["headers"]["id"] for message in queued} == {job.id for job in jobs}


def test_a_broker_that_was_never_used_closes(apart: Settings) -> None:
    Broker(apart).close()


def test_a_model_has_a_queue_per_priority_high_first() -> None:
    expected = ["blipq.demo.high", "blipq.demo.normal", "blipq.demo.low"]
    assert queues_of("demo") == expected
    assert [Priority(queue.rsplit(".", 1)[1]) for queue in expected] == list(Priority)
