"""A job's handle and the options that every job can be given."""

import json
from collections.abc import Iterator

import pytest
from celery import Celery

from blipq import (
    Client,
    IdempotencyConflict,
    JobCancelled,
    JobExpired,
    JobNotFound,
    Priority,
    ResultTimeout,
    Settings,
)
from conftest import wait_until

# Jobs for this model wait: no worker serves it.
NOBODY = "nobody"


@pytest.mark.usefixtures("worker")
def test_a_handle_from_a_stored_id(client: Client, picture: bytes) -> None:
    stored = client.caption(picture).id
    assert client.job(stored).result(timeout=60).text


@pytest.mark.usefixtures("worker")
def test_another_client_can_wait_for_the_result(
    client: Client, settings: Settings, picture: bytes
) -> None:
    job = client.caption(picture)
    with Client(settings) as other:
        assert other.job(job.id).result(timeout=60).text


@pytest.mark.usefixtures("worker")
def test_a_result_can_be_read_again(client: Client, picture: bytes) -> None:
    job = client.caption(picture)
    assert job.result(timeout=60) == job.result(timeout=0)


@pytest.mark.usefixtures("worker")
def test_wait_gives_the_whole_job(client: Client, picture: bytes) -> None:
    info = client.caption(picture).wait(timeout=60)
    assert (info.status, info.attempts, info.ended) == ("succeeded", 1, True)
    assert info.created_at <= info.started_at <= info.completed_at <= info.expires_at


def test_a_timeout_leaves_the_job_alone(client: Client, picture: bytes) -> None:
    job = client.caption(picture, model=NOBODY)
    with pytest.raises(ResultTimeout, match="still queued"):
        job.result(timeout=0.1)
    assert job.status() == "queued"
    job.cancel()


def test_a_timeout_says_when_no_live_worker_serves_the_model(
    client: Client, picture: bytes
) -> None:
    job = client.caption(picture, model=NOBODY)
    with pytest.raises(ResultTimeout, match="no live worker serves the model 'nobody'"):
        job.result(timeout=0.1)
    job.cancel()


def test_an_unknown_id_is_not_found(client: Client) -> None:
    with pytest.raises(JobNotFound):
        client.job("job_00000000-0000-7000-8000-000000000000").result(timeout=1)


def test_cancel(client: Client, picture: bytes) -> None:
    job = client.caption(picture, model=NOBODY)
    assert job.cancel()
    with pytest.raises(JobCancelled):
        job.result(timeout=1)


def test_an_idempotency_key_makes_one_job_of_many_submits(client: Client, picture: bytes) -> None:
    first = client.caption(picture, model=NOBODY, idempotency_key="order-42")
    assert client.caption(picture, model=NOBODY, idempotency_key="order-42") == first
    with pytest.raises(IdempotencyConflict):
        client.vqa(picture, "why?", model=NOBODY, idempotency_key="order-42")
    first.cancel()


def test_after_expires_in_nobody_wants_the_answer(client: Client, picture: bytes) -> None:
    with pytest.raises(JobExpired):
        client.caption(picture, model=NOBODY, expires_in="50ms").result(timeout=10)


def test_metadata_comes_back(client: Client, picture: bytes) -> None:
    job = client.caption(picture, model=NOBODY, metadata={"order": "42"})
    assert job.info().metadata == {"order": "42"}
    job.cancel()


@pytest.mark.usefixtures("worker")
def test_the_output_is_written_to_s3(client: Client, picture: bytes) -> None:
    job = client.caption(picture, output="s3://blipq-outputs/caption.json")
    result = job.result(timeout=60)
    stored = client.storage.client.get_object(Bucket="blipq-outputs", Key="caption.json")
    assert json.loads(stored["Body"].read())["captions"][0]["text"] == result.text


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize("priority", Priority)
def test_every_priority_is_served(client: Client, picture: bytes, priority: Priority) -> None:
    assert client.caption(picture, priority=priority).result(timeout=60).text


# --- without blipq's client -----------------------------------------------------------------------


@pytest.fixture
def celery(settings: Settings) -> Iterator[Celery]:
    """A plain Celery app, as any other service has one."""
    app = Celery(broker=settings.effective_broker_url, set_as_current=False)
    yield app
    app.close()


@pytest.mark.usefixtures("worker")
def test_a_plain_celery_client_sends_an_id_and_a_request(
    celery: Celery, client: Client, picture: bytes
) -> None:
    request = {"image": client.storage.upload(picture).uri}
    celery.send_task("blipq.caption", args=["my-job-1", request], queue="blipq.default.normal")
    job = client.job("my-job-1")
    wait_until(lambda: client.ledger.read("my-job-1"), "the worker to record the job")
    assert job.result(timeout=60).text


@pytest.mark.usefixtures("worker")
def test_a_plain_celery_client_is_told_what_is_wrong(celery: Celery, client: Client) -> None:
    celery.send_task("blipq.caption", args=["my-job-2", {}], queue="blipq.default.normal")
    wait_until(lambda: client.ledger.read("my-job-2"), "the worker to record the job")
    error = client.job("my-job-2").wait(timeout=60).error
    assert (error.code, "image" in error.message) == ("invalid_request", True)
