"""Publishing never holds its caller up, and loses nothing that is recorded."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import redis

from blipq import Client, Priority, Settings
from blipq.broker import PUBLISH_TIMEOUT_S, Broker, queues_of
from blipq.contract import Kind
from blipq.ledger import Message

MESSAGE = Message(Kind.CAPTION, "job_1", "blipq.default.normal")
NOWHERE = "redis://127.0.0.1:1/0"


def test_a_message_carries_the_id_and_the_contract(
    apart: Settings, raw_redis: "redis.Redis"
) -> None:
    broker = Broker(apart)
    assert broker.publish(MESSAGE)
    message = json.loads(raw_redis.lindex("blipq.default.normal", 0))
    assert message["headers"]["task"] == "blipq.caption"
    assert message["headers"]["id"] == "job_1"
    assert message["headers"]["contract"] == 1
    assert len(json.dumps(message)) < 700, "no more than a worker needs"
    assert message["properties"]["delivery_info"]["routing_key"] == "blipq.default.normal"
    broker.close()


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
        assert job.status == "queued"


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
