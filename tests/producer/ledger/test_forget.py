"""What an erasure leaves in Redis and S3: nothing of the job, and no way to bring it back."""

import json
import logging
from collections.abc import Iterator

import pytest
import redis
from typer.testing import CliRunner

from blipq import (
    Client,
    JobCancelled,
    JobFilter,
    Options,
    QueueFull,
    QueueUnavailable,
    Settings,
    Submission,
)
from blipq.cli import app
from blipq.contract import CaptionRequest
from blipq.ledger import keys
from blipq.ledger.connection import connect
from blipq.ledger.worker import Claim, WorkerLedger
from blipq.s3.refusals import Refusal, S3Refused, S3Unavailable
from blipq.s3.storage import Storage

IMAGE = "s3://uploads/secret-name.jpg"
REQUEST = CaptionRequest.model_validate({"image": IMAGE, "prompt": "secret prompt"})
RESULT = json.dumps({"kind": "caption", "captions": [{"text": "secret answer"}]})
ERROR = json.dumps({"code": "image_not_found", "message": "secret key"})
OPTIONS = Options.model_validate(
    {
        "idempotency_key": "secret-key",
        "metadata": {"user": "secret-user"},
        "webhook": {"url": "https://example.org/secret", "events": ["job.running", "job.failed"]},
    }
)


def submitted(ledger: WorkerLedger, id: str = "job_1") -> None:
    ledger.submit(Submission(REQUEST, OPTIONS, id), notify="test")


def submitted_alone(ledger: WorkerLedger, id: str) -> None:
    ledger.submit(Submission(REQUEST, Options(), id), notify="test")


def claimed(ledger: WorkerLedger, id: str = "job_1") -> Claim:
    claim = ledger.claim(id, "w1")
    assert isinstance(claim, Claim)
    return claim


def dumped(raw: "redis.Redis") -> Iterator[str]:
    """Every key of ours, with what is in it."""
    readers = {
        "hash": raw.hgetall,
        "string": raw.get,
        "zset": lambda key: raw.zrange(key, 0, -1),
        "stream": raw.xrange,
    }
    for key in raw.scan_iter("blipq:*"):
        yield f"{key} {readers[str(raw.type(key))](key)}"


def test_nothing_of_a_job_is_left_in_redis(
    client: Client, ledger: WorkerLedger, raw_redis: "redis.Redis"
) -> None:
    submitted(ledger)
    ledger.fail(claimed(ledger), ERROR, "{}", dead=True)
    client.retry_all(["job_1"])
    ledger.fail(claimed(ledger), ERROR, "{}")
    raw_redis.hset(keys.event("job_1/job.failed"), "body", "secret body")
    assert any("secret" in line for line in dumped(raw_redis))
    report = client.forget(JobFilter(metadata={"user": "secret-user"}))
    assert (report.jobs, report.events) == (["job_1"], 4)  # it ran twice
    assert raw_redis.ttl(keys.FORGOTTEN) > 0  # it names the image by a digest, for workers
    lines = list(dumped(raw_redis))
    assert not [line for line in lines if "secret" in line]
    about = [line for line in lines if "job_1" in line]
    assert [line.partition(" ")[0] for line in about] == [keys.ACTIONS]  # who erased which id


@pytest.mark.parametrize("runs", [False, True])
def test_a_message_cannot_bring_back_a_job_that_was_open(
    client: Client, ledger: WorkerLedger, raw_redis: "redis.Redis", runs: bool
) -> None:
    """A foreign client's message holds the whole request, and may be delivered again."""
    submitted(ledger)
    claim = claimed(ledger) if runs else None
    client.forget(["job_1"])
    assert ledger.claim("job_1", "w2") == "ended"
    if claim is not None:
        assert ledger.renew({"job_1": claim.token}) == ["job_1"]
        assert not ledger.succeed(claim, RESULT, "{}")
    assert not any("secret" in line for line in dumped(raw_redis))
    with pytest.raises(JobCancelled):
        client.job("job_1").result(timeout=1)


@pytest.mark.parametrize("ending", ["cancelled", "failed"])
def test_a_message_cannot_bring_back_a_foreign_job_that_had_ended(
    client: Client, ledger: WorkerLedger, raw_redis: "redis.Redis", ending: str
) -> None:
    """Its message may be in a queue, or in a worker's hands, long after a cancel."""
    ledger.submit(Submission(REQUEST, OPTIONS, "job_1"), notify=keys.FOREIGN)
    if ending == "cancelled":
        client.cancel_all(["job_1"])
    else:
        ledger.fail(claimed(ledger), ERROR, "{}")
    assert client.forget(["job_1"]).jobs == ["job_1"]
    assert ledger.claim("job_1", "w2") == "ended"
    assert not any("secret" in line for line in dumped(raw_redis))
    assert raw_redis.ttl(keys.job("job_1")) > 0


def test_what_keeps_a_message_from_bringing_a_job_back_is_no_job_to_erase(
    client: Client, ledger: WorkerLedger
) -> None:
    submitted(ledger)
    client.forget(["job_1"])
    assert client.count(JobFilter(model="default")) == 0
    assert client.forget(["job_1"]).jobs == []
    assert ledger.claim("job_1", "w2") == "ended"


def test_erasing_makes_room_where_redis_has_none(own_redis: Settings) -> None:
    with connect(own_redis) as raw, Client(own_redis) as client:
        ledger = WorkerLedger(raw, own_redis)
        submitted(ledger)
        submitted_alone(ledger, "job_2")
        ledger.fail(claimed(ledger), ERROR, "{}")
        raw.config_set("maxmemory", "1")
        with pytest.raises(QueueFull):
            submitted_alone(ledger, "job_3")
        assert client.forget(["job_1", "job_2"]).jobs == ["job_1", "job_2"]
        assert not any("secret" in line for line in dumped(raw))


def test_an_erased_job_posts_no_event(
    client: Client, ledger: WorkerLedger, raw_redis: "redis.Redis"
) -> None:
    submitted(ledger)
    claimed(ledger)
    client.forget(["job_1"])
    assert raw_redis.exists(keys.event("job_1/job.running")) == 0
    assert raw_redis.zcard(keys.outbox("example.org")) == 0


def test_of_ended_jobs_alone_one_that_is_open_by_then_stays(
    client: Client, ledger: WorkerLedger, raw_redis: "redis.Redis"
) -> None:
    for id in ("job_1", "job_2"):
        submitted_alone(ledger, id)
    ledger.fail(claimed(ledger, "job_1"), ERROR, "{}")
    assert client.forget(["job_1", "job_2"], only_ended=True).jobs == ["job_1"]
    assert not raw_redis.exists(keys.job("job_1")), "one that had ended leaves no mark"
    claimed(ledger, "job_2")


@pytest.mark.parametrize("only_ended", [False, True])
def test_a_job_that_had_ended_is_not_tried_again_while_it_is_erased(
    client: Client, ledger: WorkerLedger, only_ended: bool
) -> None:
    submitted_alone(ledger, "job_1")
    ledger.fail(claimed(ledger), ERROR, "{}")
    (job,) = ledger.forget(["job_1"], erase=False, only_ended=only_ended)
    assert client.retry_all(["job_1"]) == 0
    ledger.forget([job.id], erase=True)
    assert client.count(JobFilter(model="default")) == 0


def test_a_job_that_is_being_erased_is_not_tried_again(
    client: Client, ledger: WorkerLedger, raw_redis: "redis.Redis"
) -> None:
    submitted(ledger)
    ledger.forget(["job_1"], erase=False)
    assert client.retry_all(["job_1"]) == 0
    ledger.forget(["job_1"], erase=True)
    assert not any("secret" in line for line in dumped(raw_redis))


def test_an_erased_job_is_taken_once_from_the_work_that_is_open(
    client: Client, ledger: WorkerLedger, raw_redis: "redis.Redis"
) -> None:
    for n in range(4):
        submitted_alone(ledger, f"job_{n}")
    counted = raw_redis.hgetall(keys.work("default"))
    assert list(counted.values()) == ["4"]
    ledger.fail(claimed(ledger, "job_0"), ERROR, "{}")
    client.forget(["job_0", "job_1"])  # one that failed, and one that is open
    assert raw_redis.hgetall(keys.work("default")) == dict.fromkeys(counted, "2")


def test_jobs_of_a_tenant_are_erased_with_their_keys(
    client: Client, ledger: WorkerLedger, raw_redis: "redis.Redis"
) -> None:
    for tenant in ("shop", "zoo"):
        job = Submission(REQUEST, OPTIONS, f"job_{tenant}", tenant)
        ledger.submit(job, notify="test")
        ledger.fail(claimed(ledger, job.id), ERROR, "{}")
    assert client.forget(JobFilter(tenant="shop")).jobs == ["job_shop"]
    left = raw_redis.keys(keys.idempotency("*"))
    assert left == [keys.idempotency("zoo:secret-key")]


def test_the_record_stays_until_s3_has_deleted(
    client: Client, ledger: WorkerLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = client.caption(b"a picture")
    ledger.succeed(claimed(ledger, job.id), RESULT, "{}")

    def away(self: Storage, uri: str) -> None:
        raise S3Unavailable("S3 does not answer")

    with monkeypatch.context() as patched:
        patched.setattr(Storage, "delete", away)
        with pytest.raises(QueueUnavailable):
            client.forget([job.id])
    assert job.status() == "succeeded"
    assert len(client.forget([job.id]).objects) == 1


def test_what_s3_refuses_to_delete_is_told(
    client: Client, ledger: WorkerLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = client.caption(b"another picture")
    ledger.succeed(claimed(ledger, job.id), RESULT, "{}")

    def refused(self: Storage, uri: str) -> None:
        raise S3Refused("no s3:DeleteObject", Refusal.FORBIDDEN)

    monkeypatch.setattr(Storage, "delete", refused)
    report = client.forget([job.id])
    assert (report.jobs, report.objects) == ([job.id], [])
    assert "no s3:DeleteObject" in report.left[0]


def test_only_an_output_that_the_job_wrote_is_deleted(client: Client, ledger: WorkerLedger) -> None:
    """A job that was refused may name any object there is."""
    uri = f"s3://{client.settings.inbox_bucket}/answers/1.json"
    client.storage.put(uri, b"{}", content_type="application/json")
    refused, wrote = (client.caption(IMAGE, output=uri) for _ in range(2))
    ledger.fail(claimed(ledger, refused.id), ERROR, "{}")
    ledger.succeed(claimed(ledger, wrote.id), RESULT, "{}")
    assert client.forget([refused.id]).left == [f"{uri}: job {refused.id} may have written it"]
    assert client.forget([wrote.id]).objects == [uri]


def test_the_log_has_no_content(
    client: Client, ledger: WorkerLedger, caplog: pytest.LogCaptureFixture
) -> None:
    submitted(ledger)
    with caplog.at_level(logging.INFO):
        client.forget(["job_1"])
    assert "job_1: forgotten" in caplog.text
    assert "secret" not in caplog.text


def test_the_command_counts_asks_and_erases(
    apart: Settings, ledger: WorkerLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLIPQ_REDIS_URL", apart.redis_url)
    submitted(ledger)
    where = ["forget", "--metadata", "user=secret-user"]
    assert CliRunner().invoke(app, [*where, "--dry-run"]).stdout == "1 would go\n"
    assert CliRunner().invoke(app, where, input="n\n").exit_code != 0
    ran = CliRunner().invoke(app, [*where, "--yes", "--json"])
    assert json.loads(ran.stdout)["jobs"] == ["job_1"]
    assert ledger.claim("job_1", "w1") == "ended"


def test_an_upload_of_which_a_job_named_a_part_stays(client: Client, ledger: WorkerLedger) -> None:
    """It may hold the pictures of others, and is named as left."""
    whole = client.storage.upload(b"two pictures in one tar")
    part = whole.model_copy(update={"etag": "x", "offset": 4, "length": 8})
    job = client.caption(part)
    ledger.succeed(claimed(ledger, job.id), RESULT, "{}")
    report = client.forget([job.id])
    assert (report.jobs, report.objects) == ([job.id], [])
    assert report.left == [f"{whole.uri}: the job named a part of it"]
    assert client.storage.head(whole.bucket, whole.key) is not None
