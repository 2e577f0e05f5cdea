"""The doctor, on services that are well and on services that are not."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from pytest_httpserver import HTTPServer

from blipq import Client, Settings
from blipq.contract import CONTRACT
from blipq.errors import QueueUnavailable
from blipq.ledger.connection import COMPACT_FIELD, connect
from blipq.ledger.worker import WorkerLedger
from blipq.local.stack import LocalStack
from blipq.local.supervisor import Service
from blipq.ops.doctor import Finding, examine
from blipq.ops.doctor.canary import _judged
from blipq.ops.doctor.examination import _each, _without_secrets
from blipq.ops.doctor.findings import skew
from blipq.ops.doctor.machine import _gpu_findings
from blipq.ops.doctor.redis import check_tls
from blipq.ops.doctor.storage import PROBE_KEY
from blipq.ops.doctor.workers import check_workers
from conftest import ROOT, blipq, ledger_of, start_worker, wait_for_worker


def found(settings: Settings, *, canary: bool = False) -> dict[str, Finding]:
    """The findings by what was checked; the worst of each."""
    severity = {"ok": 0, "warn": 1, "bad": 2}
    findings: dict[str, Finding] = {}
    for finding in examine(settings, canary=canary):
        known = findings.get(finding.check)
        if known is None or severity[finding.state] > severity[known.state]:
            findings[finding.check] = finding
    return findings


@pytest.fixture
def tiny_worker(apart: Settings, stack: LocalStack, tmp_path: Path) -> Iterator[Settings]:
    """A real worker with random weights, under the name that the canary asks for."""
    from worker.tiny_models import save_opt

    worker: Service = start_worker(
        stack,
        tmp_path / "worker.log",
        redis_url=apart.redis_url,
        models=f"default={save_opt(tmp_path / 'opt')}",
        canary="0",
        dtype="float32",
    )
    wait_for_worker(worker, apart)
    yield apart
    worker.stop(timeout=30)


def test_services_that_are_well_have_nothing_to_mend(apart: Settings) -> None:
    findings = found(apart)
    for check in ("redis", "redis eviction", "redis persistence", "redis clock"):
        assert findings[check].state == "ok", findings[check]
    for check in ("s3 credentials", "s3 write", "s3 read", "s3 conditional write", "s3 clock"):
        assert findings[check].state == "ok", findings[check]
    assert findings["dead letters"].state == "ok"


def test_a_worker_runs_the_doctors_job_end_to_end(tiny_worker: Settings, stack: LocalStack) -> None:
    ran = blipq("doctor", "--json", stack=stack, BLIPQ_REDIS_URL=tiny_worker.redis_url)
    told = json.loads(ran.stdout)
    canary = next(check for check in told["checks"] if check["check"] == "canary")
    assert canary["state"] == "warn", canary  # random weights see no red square
    assert (told["ok"], ran.returncode) == (True, 0), told


@pytest.mark.usefixtures("worker")
def test_the_canary_says_what_it_asked_and_got(settings: Settings) -> None:
    canary = found(settings, canary=True)["canary"]
    assert canary.state == "ok"
    assert "the caption of a red square is 'a red square in the center'" in canary.message


@pytest.mark.parametrize(
    ("text", "checkpoint", "state"),
    [
        ("a red square on a white background", "opt-2.7b", "ok"),
        ("a red box", "opt-2.7b", "ok"),
        ("a woman and her dog", "opt-2.7b", "warn"),
        ("", "opt-2.7b", "bad"),
        ("a red box", "demo", "bad"),
    ],
)
def test_a_caption_that_does_not_fit_is_told(text: str, checkpoint: str, state: str) -> None:
    assert _judged(text, checkpoint, 0.1).state == state


def test_without_a_worker_it_says_how_to_start_one(apart: Settings) -> None:
    findings = found(apart, canary=True)
    assert findings["workers"].state == "warn"
    assert "blipq worker" in (findings["workers"].advice or "")
    assert findings["canary"].message.startswith("not run")


def test_jobs_that_nobody_will_run_are_bad(apart: Settings, client: Client) -> None:
    client.caption("s3://bucket/key", model="forgotten")
    finding = found(apart)["queues"]
    assert finding.state == "bad"
    assert "blipq.forgotten.normal: 1 waiting" in finding.message
    assert "BLIPQ_MODELS=forgotten=" in (finding.advice or "")
    assert "blipq queue purge blipq.forgotten.normal" in (finding.advice or "")


def test_a_draining_worker_does_not_count(apart: Settings, ledger: WorkerLedger) -> None:
    info = json.dumps({"models": ["default"], "active": 1, "draining": True})
    ledger.register("leaving", [], info, ttl_s=30, spare=False)
    assert found(apart)["workers"].state == "warn"


def test_a_worker_whose_model_waits_for_decoded_images_is_a_warning(
    apart: Settings, ledger: WorkerLedger
) -> None:
    info = {"models": ["default"], "active": 1, "decode_bound": True}
    ledger.register("short of cores", ["default"], json.dumps(info), ttl_s=30, spare=False)
    finding = next(each for each in check_workers(apart) if each.state == "warn")
    assert "1 of 1 for the model 'default' wait for images to be decoded" in finding.message
    assert "more cores" in (finding.advice or "")


def test_workers_of_an_earlier_contract_are_a_warning(
    apart: Settings, ledger: WorkerLedger
) -> None:
    info: dict[str, Any] = {"models": ["default"], "active": 0}
    ledger.register("earlier", ["default"], json.dumps(info), ttl_s=30, spare=False)
    ledger.register(
        "new", ["default"], json.dumps(info | {"contract": CONTRACT}), ttl_s=30, spare=False
    )
    finding = next(each for each in check_workers(apart) if each.state == "warn")
    assert f"1 of 2 for the model 'default' lack contract {CONTRACT}" in finding.message


@pytest.mark.parametrize(
    ("way", "state"),
    [
        ("static slots, triton in graphs on cuda", "ok"),
        ("growing slots on cpu", "ok"),
        ("static slots, sdpa eagerly on cuda:1", "warn"),
        ("growing slots on cuda", "warn"),
    ],
)
def test_a_gpu_that_takes_steps_without_graphs_is_a_warning(
    apart: Settings, ledger: WorkerLedger, way: str, state: str
) -> None:
    info = {"models": ["default"], "active": 1, "decoding": {"default": way}}
    ledger.register("one", ["default"], json.dumps(info), ttl_s=30, spare=False)
    finding = next(each for each in check_workers(apart) if "write by" in each.message)
    assert finding.message == f"1 of 1 for the model 'default' write by {way}"
    assert finding.state == state
    assert ("CUDA graphs" in (finding.advice or "")) == (state == "warn")


def test_a_wrong_password_is_told_as_one_and_not_as_an_absent_redis(own_redis: Settings) -> None:
    with connect(own_redis) as raw:
        raw.config_set("requirepass", "right")
    url = own_redis.redis_url.replace("redis://", "redis://:wr%23ng@")
    settings = own_redis.model_copy(update={"redis_url": url})
    finding = found(settings)["redis"]
    assert finding.state == "bad"
    assert "refuses the user or password" in finding.message
    with Client(settings) as client, pytest.raises(QueueUnavailable, match="user or password"):
        client.caption("s3://uploads/cat.jpg")
    with (
        Client(own_redis) as client,
        pytest.raises(QueueUnavailable, match="without a password: put"),
    ):
        client.caption("s3://uploads/cat.jpg")


def test_a_database_that_is_not_there_is_no_silence(own_redis: Settings) -> None:
    url = own_redis.redis_url.removesuffix("/0") + "/99"
    finding = found(own_redis.model_copy(update={"redis_url": url}))["redis"]
    assert finding.state == "bad"
    assert finding.message == "it refuses: DB index is out of range"


RULE = "~blipq* ~_kombu* ~unacked* &* +@all -@admin -@dangerous +info"


def test_a_user_with_the_documented_rule_submits_and_a_narrower_one_is_told_where_to_look(
    own_redis: Settings,
) -> None:
    assert f"ACL SETUSER blipq on >PASSWORD {RULE}" in (ROOT / "docs" / "production.md").read_text()
    url = own_redis.redis_url.replace("redis://", "redis://blipq:pw@")
    settings = own_redis.model_copy(update={"redis_url": url, "timeout_s": 3.0})
    with connect(own_redis) as raw, Client(settings) as client:
        raw.execute_command("ACL", "SETUSER", "blipq", "on", ">pw", *RULE.split())
        job = client.caption("s3://photos/1.jpg")
        assert job.status() == "queued"
        assert raw.llen("blipq.default.normal") == 1, "it was published"
        raw.execute_command("ACL", "SETUSER", "blipq", "resetkeys", "~blipq.*")
        with pytest.raises(QueueUnavailable, match="ACL LOG"):
            job.status()


def test_a_redis_that_evicts_and_forgets_is_told(own_redis: Settings) -> None:
    with connect(own_redis) as raw:
        raw.config_set("maxmemory-policy", "allkeys-lru")
    findings = found(own_redis)
    assert findings["redis eviction"].state == "bad"
    assert findings["redis persistence"].state == "warn"


def test_a_redis_that_takes_twice_the_memory_is_told(own_redis: Settings) -> None:
    with connect(own_redis) as raw:
        raw.config_set("hash-max-ziplist-value", 64)
        assert "twice the memory" in found(own_redis)["redis memory"].message
        raw.config_set("hash-max-ziplist-value", COMPACT_FIELD)
        assert found(own_redis)["redis memory"].state == "ok"
        raw.execute_command("ACL", "SETUSER", "default", "-config")
    assert found(own_redis)["redis memory"].state == "ok", "a managed Redis does not say"


def test_a_redis_that_fills_is_told(own_redis: Settings) -> None:
    with connect(own_redis) as raw:
        raw.config_set("maxmemory-policy", "noeviction")
        raw.config_set("maxmemory", int(raw.info("memory")["used_memory"] * 1.2))
    assert found(own_redis)["redis memory"].state == "warn"


def test_what_does_not_answer_is_bad_and_nothing_rests_on_it(apart: Settings) -> None:
    gone = apart.model_copy(
        update={"redis_url": "redis://:hush@127.0.0.1:1/0", "s3_endpoint_url": "http://127.0.0.1:1"}
    )
    started = time.monotonic()
    findings = found(gone, canary=True)
    assert findings["redis"].state == findings["s3"].state == "bad"
    assert "workers" not in findings
    assert time.monotonic() - started < 60


def test_without_keys_s3_is_not_blamed_for_silence(
    apart: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    keyless = {"s3_access_key_id": None, "s3_secret_access_key": None}
    findings = found(apart.model_copy(update=keyless))
    assert findings["s3 credentials"].state == "bad"
    assert "blipq up" in (findings["s3 credentials"].advice or "")
    assert "s3" not in findings


def test_a_missing_bucket_is_told_and_can_be_made(apart: Settings, httpserver: HTTPServer) -> None:
    missing = "<Error><Code>NoSuchBucket</Code></Error>"
    probe = f"/{apart.inbox_bucket}/{PROBE_KEY}"
    httpserver.expect_request(probe).respond_with_data(missing, status=404)
    httpserver.expect_oneshot_request(f"/{apart.inbox_bucket}", method="PUT").respond_with_data()
    settings = apart.model_copy(update={"s3_endpoint_url": httpserver.url_for("").rstrip("/")})
    assert "--create-bucket" in (found(settings)["s3 write"].advice or "")
    list(examine(settings, canary=False, create_bucket=True))
    httpserver.check_assertions()
    assert any(request.path == f"/{apart.inbox_bucket}" for request, _ in httpserver.log)


def test_wrong_keys_are_told(apart: Settings) -> None:
    settings = Settings.model_validate(
        {**apart.model_dump(), "s3_access_key_id": "nobody", "s3_secret_access_key": "wrong"}
    )
    assert found(settings)["s3 write"].state == "bad"


@pytest.mark.parametrize(
    ("outputs", "state", "said"),
    [
        ([["answers", "b"], ["b", "answers"]], "ok", "may write to answers, b"),
        ([[]], "ok", "with an output are refused"),
        ([["answers"], []], "warn", "nowhere / answers"),
        ([None], "ok", "do not say"),
    ],
)
def test_it_says_where_outputs_may_go(
    apart: Settings, outputs: list[list[str] | None], state: str, said: str
) -> None:
    with Client(apart) as client:
        for number, allowed in enumerate(outputs):
            info: dict[str, Any] = {"models": ["default"], "active": 0}
            info |= {} if allowed is None else {"outputs": allowed}
            name = f"w{number}"
            ledger_of(client).register(name, ["default"], json.dumps(info), ttl_s=60, spare=True)
        finding = found(apart)["outputs"]
    assert (finding.state, said in finding.message) == (state, True)


def test_an_s3_without_conditional_writes_is_told(apart: Settings, httpserver: HTTPServer) -> None:
    """It answers 200 to everything, three hours ago."""
    late = {"Date": "Tue, 24 Nov 2026 00:00:00 GMT"}
    httpserver.expect_request(f"/{apart.inbox_bucket}/{PROBE_KEY}", method="PUT").respond_with_data(
        headers=late
    )
    httpserver.expect_request(f"/{apart.inbox_bucket}/{PROBE_KEY}", method="GET").respond_with_data(
        "other"
    )
    settings = apart.model_copy(update={"s3_endpoint_url": httpserver.url_for("").rstrip("/")})
    findings = found(settings)
    assert findings["s3 conditional write"].state == "warn"
    assert findings["s3 read"].state == "bad"


def test_a_clock_that_is_off_is_told() -> None:
    assert [skew("clock", seconds).state for seconds in (0.2, -60.0, 3600.0)] == [
        "ok",
        "warn",
        "bad",
    ]


def test_another_broker_is_looked_at_too(apart: Settings) -> None:
    well = apart.model_copy(update={"broker_url": apart.redis_url})
    assert found(well)["broker"].state == "ok"
    gone = apart.model_copy(update={"broker_url": "amqp://user:hush@127.0.0.1:1//"})
    assert found(gone)["broker"].state == "bad"


def test_no_secret_is_printed(apart: Settings, stack: LocalStack) -> None:
    environment = stack.environment()
    secret = environment["BLIPQ_S3_SECRET_ACCESS_KEY"]
    password = apart.redis_url.partition("://:")[2].partition("@")[0]
    ran = blipq(
        "doctor", "--no-canary", stack=stack, BLIPQ_BROKER_URL="amqp://me:hush@127.0.0.1:1//"
    )
    assert ran.returncode == 1
    for hidden in (secret, password, "hush"):
        assert hidden not in ran.stdout + ran.stderr


def test_an_answer_that_echoes_a_secret_is_cut() -> None:
    settings = Settings(redis_url="redis://:hush@127.0.0.1:1/0")
    finding = _without_secrets(settings, Finding("bad", "redis", "no hush here", "hush"))
    assert (finding.message, finding.advice) == ("no *** here", "***")


def test_a_check_that_breaks_is_a_finding(apart: Settings) -> None:
    def broken(_: Settings) -> Iterator[Finding]:
        raise redis.ResponseError("NOPERM")
        yield

    (finding,) = _each(apart, "redis", broken)
    assert (finding.state, finding.message) == ("bad", "ResponseError: NOPERM")


def test_gpus_are_read_as_nvidia_smi_lists_them() -> None:
    listed = subprocess.CompletedProcess([], 0, "NVIDIA L4, 550.54.15, 23034, 22500\n", "")
    (finding,) = _gpu_findings(listed)
    assert finding.message == "NVIDIA L4, driver 550.54.15, 22500 of 23034 MiB free"
    lost = subprocess.CompletedProcess([], 9, "", "NVIDIA-SMI has failed\n")
    assert next(_gpu_findings(lost)).state == "bad"


def test_looking_needs_neither_torch_nor_pillow() -> None:
    code = "import sys, blipq.ops.doctor, blipq_worker.cli.models; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert not {"torch", "PIL", "transformers", "boto3"} & set(ran.stdout.split())


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("rediss://:hush@h/0", []),
        ("redis://:hush@h/0", []),
        ("rediss://:hush@h/0?ssl_cert_reqs=none", ["the server"]),
        ("sentinels://:hush@h/0?ssl_check_hostname=false", ["the host's name"]),
    ],
)
def test_a_server_that_is_not_verified_is_told(url: str, told: list[str]) -> None:
    found = list(check_tls(Settings(redis_url=url)))
    assert [finding.message.split(": ")[1] for finding in found] == [
        f"{what} is not verified" for what in told
    ]
    assert all(finding.state == "warn" for finding in found)
    query = "?ssl_cert_reqs=none"
    for broker_url in (f"amqps://h//{query}", f"amqps://h//{query};amqps://i//{query}"):
        (finding,) = check_tls(Settings(broker_url=broker_url))
        assert finding.message.startswith("broker_url: the server is not verified")
