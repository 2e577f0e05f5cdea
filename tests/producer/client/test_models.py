"""Names of models: known ones are taken, with or without a worker; others leave nothing behind."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from blipq import (
    CaptionRequest,
    Client,
    InvalidRequest,
    JobFailed,
    Options,
    ResultTimeout,
    Settings,
    SubmitStopped,
    UnknownModel,
)
from blipq.ledger.worker import Claim, WorkerLedger
from blipq.submission import Submission
from blipq.watch.rules import Rules
from blipq.watch.start import check_models
from blocking import BlockingClient
from conftest import blipq, wait_until

IMAGE = "s3://uploads/cat.jpg"
DAY = 86400


def serve(ledger: WorkerLedger, *models: str, ttl_s: float = 60) -> None:
    ledger.register("w1", models, "{}", ttl_s=ttl_s, spare=False)


def without_worker(ledger: WorkerLedger, model: str) -> None:
    """Its last worker has left."""
    serve(ledger, model, ttl_s=0.05)
    wait_until(lambda: not _live(ledger, model), "the end of the worker")


def _live(ledger: WorkerLedger, model: str) -> int:
    seconds, micros = ledger.redis.time()
    return int(
        ledger.redis.zcount(f"blipq:serving:{model}", seconds * 1000 + micros / 1000, "+inf")
    )


@pytest.mark.parametrize("opened", [Client, BlockingClient])
def test_an_unknown_model_is_refused_at_submit_and_told_who_serves_what(
    apart: Settings, ledger: WorkerLedger, opened: Callable[..., Any]
) -> None:
    """It waited for a minute, and left a job for a week and a queue for ever."""
    serve(ledger, "default", "opt")
    without_worker(ledger, "t5")
    with opened(apart) as client, pytest.raises(UnknownModel) as refused:
        client.caption(IMAGE, model="optt")
    assert refused.value.model == "optt"
    told = str(refused.value)
    assert told.startswith("model: no worker has served 'optt' in the last 40 days; served: ")
    assert "'default' (1 live worker)" in told
    assert "'opt' (1 live worker)" in told
    assert "'t5' (no live worker now)" in told


def test_refused_names_leave_nothing_behind(client: Client, raw_redis: "redis.Redis") -> None:
    client.caption(IMAGE)
    before = set(raw_redis.scan_iter())
    requests = [CaptionRequest(image=IMAGE)] * 20
    for number, request in enumerate(requests):
        with pytest.raises(UnknownModel, match="none is served yet"):
            client.submit(request, Options(model=f"ghost{number}", idempotency_key=f"k{number}"))
    assert set(raw_redis.scan_iter()) == before


@pytest.mark.parametrize("opened", [Client, BlockingClient])
def test_a_known_model_without_a_worker_is_taken_with_a_warning(
    apart: Settings,
    ledger: WorkerLedger,
    opened: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    without_worker(ledger, "opt")
    with opened(apart) as client, caplog.at_level(logging.WARNING, logger="blipq"):
        jobs = [client.caption(IMAGE, model="opt") for _ in range(2)]
        jobs += client.submit_many([CaptionRequest(image=IMAGE)] * 2, Options(model="opt"))
        infos = [job.info() for job in jobs]
    expected = "no live worker serves the model 'opt'"
    assert [info.note for info in infos] == [expected] * 4
    assert [record.message for record in caplog.records] == [f"{expected}: its jobs wait for one"]


def test_a_served_model_has_no_warning_and_no_note(
    client: Client, ledger: WorkerLedger, caplog: pytest.LogCaptureFixture
) -> None:
    serve(ledger, "opt")
    with caplog.at_level(logging.WARNING, logger="blipq"):
        assert client.caption(IMAGE, model="opt").info().note is None
    assert not caplog.records


def test_default_and_what_a_setting_names_are_always_known(client: Client) -> None:
    assert client.settings.known_models == ("nobody", "other", "forgotten", "m", "demo")
    assert client.caption(IMAGE).status() == "queued"
    assert client.caption(IMAGE, model="nobody").status() == "queued"
    for part in ("nobod", "body", "other m", ""):
        with pytest.raises(InvalidRequest, match="model"):
            client.caption(IMAGE, model=part)


def test_a_model_is_known_for_forty_days_after_its_last_worker(
    client: Client, ledger: WorkerLedger, raw_redis: "redis.Redis"
) -> None:
    without_worker(ledger, "opt")
    key = "blipq:serving:opt"
    assert 40 * DAY - 60 < raw_redis.ttl(key) <= 40 * DAY
    job = client.caption(IMAGE, model="opt", idempotency_key="one")
    raw_redis.pexpire(key, 1)
    wait_until(lambda: not raw_redis.exists(key), "forty days")
    with pytest.raises(UnknownModel):
        client.caption(IMAGE, model="opt")
    again = client.caption(IMAGE, model="opt", idempotency_key="one")
    assert again == job, "a job that is there stays the same job"


@pytest.mark.parametrize("opened", [Client, BlockingClient])
def test_many_stop_at_an_unknown_model_behind_what_is_recorded(
    apart: Settings, opened: Callable[..., Any]
) -> None:
    asked = [Submission(CaptionRequest(image=IMAGE), Options(model=m)) for m in ("m", "x", "m")]
    with opened(apart) as client, pytest.raises(SubmitStopped) as stopped:
        client.submit_many(asked, timeout=5)
    assert isinstance(stopped.value.__cause__, UnknownModel)
    assert not stopped.value.retryable
    assert stopped.value.index == 1


def environment(apart: Settings) -> dict[str, str]:
    secret = apart.s3_secret_access_key
    return {
        "BLIPQ_REDIS_URL": apart.redis_url,
        "BLIPQ_S3_ENDPOINT_URL": str(apart.s3_endpoint_url),
        "BLIPQ_S3_ACCESS_KEY_ID": str(apart.s3_access_key_id),
        "BLIPQ_S3_SECRET_ACCESS_KEY": secret.get_secret_value() if secret else "",
    }


def test_the_command_refuses_an_unknown_model_at_once(
    apart: Settings, ledger: WorkerLedger
) -> None:
    serve(ledger, "default")
    ran = blipq("caption", IMAGE, "--model", "ghost", **environment(apart))
    assert ran.returncode == 2, ran
    assert "blipq: model: no worker has served 'ghost'" in ran.stderr
    assert ledger.redis.zcard("blipq:open") == 0


def test_the_command_warns_where_it_does_not_wait(apart: Settings) -> None:
    ran = blipq("caption", IMAGE, "--no-wait", **environment(apart))
    assert ran.returncode == 0, ran
    assert "no live worker serves the model 'default': its jobs wait for one" in ran.stderr
    quiet = blipq("caption", IMAGE, "--no-wait", "--json", **environment(apart))
    assert quiet.stderr == ""


def test_a_bulk_for_an_unknown_model_is_refused_before_it_begins(
    apart: Settings, ledger: WorkerLedger, tmp_path: Path
) -> None:
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text(json.dumps({"custom_id": "1", "image": IMAGE, "kind": "caption"}))
    journal = str(tmp_path / "journal.bulk")
    arguments = ("bulk", "submit", str(manifest), "--journal", journal, "--model", "ghost")
    ran = blipq(*arguments, **environment(apart))
    assert ran.returncode == 2, ran
    assert "no worker has served 'ghost'" in ran.stderr
    assert not Path(journal).exists()


def test_rules_for_an_unknown_model_are_refused_at_the_start(ledger: WorkerLedger) -> None:
    def rules(model: str) -> Rules:
        rule = {"name": "r", "bucket": "photos", "request": {"kind": "caption"}}
        return Rules.model_validate({"name": "w", "rules": [rule | {"options": {"model": model}}]})

    check_models(rules("m"), ledger)
    with pytest.raises(InvalidRequest, match=r"rule r: options\.model: no worker"):
        check_models(rules("ghost"), ledger)


def test_the_last_error_of_a_retried_job_is_told_until_it_ends(
    client: Client, ledger: WorkerLedger
) -> None:
    job = client.caption(IMAGE)
    error = json.dumps({"code": "image_unavailable", "message": "HTTP 503", "retryable": True})
    claim = ledger.claim(job.id, "w1")
    assert isinstance(claim, Claim)
    assert job.info().last_error is None
    ledger.retry(claim, 0.001, error)
    told = job.info().last_error
    assert told is not None
    with pytest.raises(ResultTimeout, match="tried again after image_unavailable: HTTP 503"):
        job.result(timeout=0)
    assert (told.code, told.message) == ("image_unavailable", "HTTP 503")
    wait_until(lambda: _claimed(ledger, job.id), "the retry")
    claim = ledger.claim(job.id, "w1") if job.status() == "queued" else _held[job.id]
    ledger.fail(claim, error.replace("503", "500"), "{}")
    info = job.info()
    assert info.last_error is None
    assert info.error is not None
    assert info.error.message == "HTTP 500"
    with pytest.raises(JobFailed):
        job.result()


_held: dict[str, Claim] = {}


def _claimed(ledger: WorkerLedger, id: str) -> bool:
    ledger.reconcile()
    claim = ledger.claim(id, "w1")
    if isinstance(claim, Claim):
        _held[id] = claim
    return id in _held
