"""An SQS queue, as moto's server speaks it."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from blipq import QueueUnavailable, Settings
from blipq.watch.events import Notification
from blipq.watch.queue import Queue
from blipq.watch.sources import Batch
from sqs import Sqs


@pytest.fixture(scope="module")
def sqs() -> Iterator[Sqs]:
    with Sqs() as sqs:
        yield sqs


@pytest.fixture
def queue(sqs: Sqs, apart: Settings) -> Queue:
    return Queue(sqs.create(), apart, visibility_s=30, wait_s=1)


def told(batch: Batch | None) -> list[Any]:
    return [] if batch is None else batch.found


def test_a_message_is_deleted_when_its_uploads_are_recorded(sqs: Sqs, queue: Queue) -> None:
    sqs.tell(queue.url, "photos", "a b.jpg")
    batch = queue.next()
    assert told(batch) == [Notification("photos", "a b.jpg")]
    assert batch is not None
    batch.done(set())
    assert sqs.count(queue.url) == (0, 0)
    assert queue.next() is None


def test_a_message_that_is_not_done_comes_again_at_once_when_the_queue_is_closed(
    sqs: Sqs, queue: Queue
) -> None:
    sqs.tell(queue.url, "photos", "a.jpg")
    first = told(queue.next())
    assert sqs.count(queue.url) == (0, 1)
    queue.close()
    assert told(queue.next()) == first


def test_a_message_that_is_held_stays_hidden(sqs: Sqs, queue: Queue) -> None:
    queue.visibility_s = 1
    sqs.tell(queue.url, "photos", "a.jpg")
    batch = queue.next()
    assert batch is not None
    queue.visibility_s = 30
    batch.hold()
    assert queue.next() is None
    assert queue.next() is None


def test_what_cannot_be_read_is_left_for_the_redrive_policy(sqs: Sqs, queue: Queue) -> None:
    sqs.send(queue.url, "hello")
    sqs.tell(queue.url, "photos", "a.jpg")
    found: list[Any] = []
    while (batch := queue.next()) is not None:
        found += batch.found
        batch.done(set())
    assert found == [Notification("photos", "a.jpg")]
    assert sqs.count(queue.url) == (0, 1)


def test_a_message_with_an_upload_that_is_refused_is_left_too(sqs: Sqs, queue: Queue) -> None:
    sqs.tell(queue.url, "photos", "good", "bad")
    batch = queue.next()
    assert batch is not None
    batch.done({Notification("photos", "bad")})
    assert sqs.count(queue.url) == (0, 1)


def test_test_events_are_deleted(sqs: Sqs, queue: Queue) -> None:
    sqs.send(queue.url, json.dumps({"Service": "Amazon S3", "Event": "s3:TestEvent"}))
    batch = queue.next()
    assert batch is not None
    assert batch.found == []
    batch.done(set())
    assert sqs.count(queue.url) == (0, 0)


def test_a_queue_that_does_not_answer_says_so(apart: Settings) -> None:
    queue = Queue("http://127.0.0.1:1/123/none", apart, visibility_s=30, wait_s=1)
    with pytest.raises(QueueUnavailable, match="SQS does not answer"):
        queue.next()
