"""This version and the one before it on one Redis: upgrades and rollbacks lose and fail nothing."""

import json
import signal
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from blipq import Options, Settings, Status
from blipq.contract import request_adapter
from blipq.ledger.codec import prepare
from blipq.submission import Submission
from conftest import wait_until
from guarantees.earlier.submitting import KEY
from guarantees.earlier.versions import Version, earlier, this
from guarantees.rig import Rig
from stacks import BROKER


@pytest.fixture
def before(tmp_path: Path) -> Version:
    """The version before this one."""
    return earlier(tmp_path / "earlier")


@pytest.fixture
def now() -> Version:
    return this()


def drain(rig: Rig, worker: Any) -> None:
    worker.signal(signal.SIGTERM)
    rig.wait_for_death(worker)
    assert worker.exit_code == 0, worker.last_words(20)


def test_an_upgrade_and_a_rollback_under_load_lose_and_fail_no_job(
    rig: Rig, before: Version, now: Version
) -> None:
    """Clients of both versions submit and wait meanwhile; each fleet loses a worker by SIGTERM and
    one by kill -9, whose claims the other version's workers bring back."""
    slow = {"pass_s": 0.2, "max_batch_size": 4}
    first, second = (before.start_worker(rig, **slow) for _ in range(2))
    producers = [before.start_producer(rig, "before"), now.start_producer(rig, "now")]
    newer = [now.start_worker(rig, **slow)]
    drain(rig, first)
    newer.append(now.start_worker(rig, **slow))
    wait_until(lambda: rig.running() >= 4, "a full worker")
    rig.kill(second)
    third = before.start_worker(rig, **slow)
    drain(rig, newer[0])
    wait_until(lambda: rig.running() >= 4, "a full worker")
    rig.kill(newer[1])
    outcomes: dict[str, list[Any]] = {}
    for producer in producers:
        outcomes |= producer.outcomes()
    assert third.exit_code is None
    assert {status for status, *_ in outcomes.values()} == {"succeeded"}
    assert {text for _, text, *_ in outcomes.values()} == {"a text"}
    assert len({worker for *_, worker in outcomes.values()}) >= 3, "all took part"
    assert max(attempts for _, _, attempts, _ in outcomes.values()) <= 3
    assert rig.redis(lambda raw: raw.zcard("blipq:open")) == 0
    assert rig.redis(lambda raw: raw.get(f"blipq:idempotency:{KEY}")) in outcomes, "one job"


IMAGE = "s3://photos/cat.jpg"
JOBS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"kind": "caption", "image": IMAGE}, {}),
    ({"kind": "caption", "image": {"uri": IMAGE, "etag": "e"}, "prompt": "a photo of"}, {}),
    ({"kind": "caption", "image": IMAGE, "generation": {"num_beams": 3, "seed": 7}}, {}),
    ({"kind": "caption", "image": IMAGE, "best_of": 4}, {"priority": "high", "expires_in": "2h"}),
    ({"kind": "vqa", "image": IMAGE, "questions": "what?"}, {"metadata": {"b": "2", "a": "1"}}),
    ({"kind": "vqa", "image": IMAGE, "questions": ["a?"], "choices": ["x", "y"]}, {"model": "t5"}),
    (
        {"kind": "vqa", "image": IMAGE, "questions": ["and?"]}
        | {"history": [{"question": "what?", "answer": "a cat"}]},
        {"idempotency_key": "k"},
    ),
    ({"kind": "match", "image": IMAGE, "texts": ["a cat", "ein Hund ä"], "head": "itc"}, {}),
    ({"kind": "embed", "image": IMAGE, "dtype": "float32"}, {"output": "s3://results/1.json"}),
    ({"kind": "embed", "text": "a cat", "mode": "text"}, {}),
    ({"kind": "embed", "image": IMAGE, "index": {"name": "shop", "metadata": {"a": "1"}}}, {}),
    ({"kind": "describe", "image": IMAGE, "questions": ["what?"], "embed": True}, {}),
    (
        {"kind": "search", "index": "shop", "text": "a cat", "top_k": 3}
        | {"filter": {"a": ["1", "2"], "b": "3"}},
        {"webhook": {"url": "https://example.com/hook", "events": ["job.succeeded"]}},
    ),
]


def stored(request: dict[str, Any], options: dict[str, Any]) -> dict[str, str]:
    """What this version stores of a job, as ``Version.stored`` has it."""
    parsed = request_adapter.validate_python(request), Options(**options)
    job = prepare(Submission(*parsed, "job_1"), Settings(), notify="me")
    own = {"digest": job.digest, "key": options.get("idempotency_key", "")}
    own["expires_in"] = job.expires_in_ms
    return {name: str(value) for name, value in ({**job.fields} | own).items()}


def test_both_versions_store_the_same_of_the_same_request(before: Version) -> None:
    """Or a submit that is repeated after an upgrade would be a conflict, and not the same job."""
    now = [stored(*each) for each in JOBS]
    for job, then in zip(now, before.stored(JOBS), strict=True):
        assert {name: job[name] for name in then} == then


@pytest.mark.parametrize("upgrade", [True, False], ids=["upgrade", "rollback"])
def test_a_frozen_worker_of_the_other_version_cannot_end_a_job_that_was_taken_over(
    rig: Rig, before: Version, now: Version, upgrade: bool
) -> None:
    """A worker of the version before shows how often the job was claimed; this one counted none."""
    versions = (before, now) if upgrade else (now, before)
    frozen = versions[0].start_worker(rig, pass_s=1.5)
    job = rig.submit("once")
    wait_until(lambda: rig.running() == 1, "the job to run")
    frozen.signal(signal.SIGSTOP)
    second = versions[1].start_worker(rig, pass_s=6)
    wait_until(lambda: job.info().attempts == 2, "another claim")
    frozen.signal(signal.SIGCONT)
    info = job.wait(60)
    assert info.receipt is not None
    assert (info.status, info.attempts) == (Status.SUCCEEDED, 2), info
    assert f"-{second.pid}-" in str(info.receipt.worker)


def test_a_job_that_the_version_before_would_fail_waits_for_this_one(
    rig: Rig, before: Version, now: Version
) -> None:
    older = before.start_worker(rig)
    job = rig.client.caption("s3://Old_Photos/cat.jpg")
    rig.all_succeed(rig.submit_all(["known"] * 5))
    wait_until(lambda: "newer than this" in older.last_words(50), "the worker to meet it")
    assert (job.info().status, job.info().attempts) == (Status.QUEUED, 0)
    now.start_worker(rig)
    drain(rig, older)  # until then either may take the message, as often as it is published
    rig.all_succeed([job])


@pytest.mark.skipif(BROKER != "redis", reason="RabbitMQ has such messages back at once")
def test_foreign_jobs_in_the_hands_of_a_killed_worker_of_the_version_before_come_back(
    rig: Rig, before: Version, now: Version
) -> None:
    """It waited for their time with them, and nobody had recorded them: Kombu's copies are all
    there is of them."""
    older = before.start_worker(rig)
    ids = [f"job_foreign_{number}" for number in range(20)]
    eta = (datetime.now(UTC) + timedelta(seconds=15)).isoformat()
    for id in ids:
        body = json.dumps([[id, {"image": "s3://photos/cat.jpg", "prompt": id}], {}, {}])
        rig.send({"task": "blipq.caption", "id": id, "eta": eta}, body)
    wait_until(lambda: rig.redis(lambda raw: raw.hlen("unacked")) == len(ids), "all in its hands")
    rig.kill(older)
    left = rig.redis(lambda raw: raw.zrange("unacked_index", 0, -1))
    rig.redis(lambda raw: raw.zadd("unacked_index", dict.fromkeys(left, 1)))  # an hour later
    now.start_worker(rig)
    wait_until(lambda: all(rig.client.ledger.read(id) for id in ids), "their records", 60)
    rig.all_succeed([rig.client.job(id) for id in ids])
    assert rig.redis(lambda raw: raw.exists("unacked", "unacked_index")) == 0
