"""One job of each upload, whatever the source tells, and how often."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError
from typer.testing import CliRunner

from blipq import Client, QueueUnavailable, Settings
from blipq.cli import app
from blipq.s3.refusals import Refusal, S3Refused
from blipq.watch.events import Notification
from blipq.watch.rules import Rules
from blipq.watch.sources import Batch, Found
from blipq.watch.watcher import Wanted, Watcher
from conftest import ledger_of, wait_until

Put = Callable[..., None]
MakeRules = Callable[..., Rules]


class Script(Batch):
    """A batch that says what the watcher did with it."""

    def __init__(self, *found: Found) -> None:
        super().__init__(list(found))
        self.held = 0
        self.refused: set[Found] | None = None

    def hold(self) -> None:
        self.held += 1

    def done(self, refused: set[Found]) -> None:
        self.refused = refused


class Scripted:
    """A source that tells what the test says, then nothing."""

    pause_s = 0.01

    def __init__(self, *batches: Script) -> None:
        self.batches = list(batches)
        self.closed = False

    def next(self) -> Batch | None:
        return self.batches.pop(0) if self.batches else None

    def close(self) -> None:
        self.closed = True


class Watched:
    """A watcher, and what it told."""

    def __init__(self, rules: Rules, client: Client, **options: Any) -> None:
        self.told: list[tuple[Wanted, str | None]] = []
        self.stop = threading.Event()
        tell = lambda wanted, id: self.told.append((wanted, id))  # noqa: E731
        self.watcher = Watcher(rules, client, self.stop, tell, **options)

    def take(self, *batches: Script) -> None:
        self.watcher.run(Scripted(*batches), once=True)

    @property
    def keys(self) -> list[str]:
        return [wanted.upload.key for wanted, _ in self.told]

    @property
    def counts(self) -> tuple[int, int, int, int]:
        counts = self.watcher.counts
        return counts.submitted, counts.known, counts.left_out, counts.refused


def test_an_upload_becomes_a_job(rules: MakeRules, client: Client, bucket: str, put: Put) -> None:
    put("cat.jpg")
    watched = Watched(rules(options={"output": "s3://results/{key}.json"}), client)
    batch = Script(Notification(bucket, "cat.jpg"))
    watched.take(batch)
    ((_, id),) = watched.told
    job = client.ledger.redis.hgetall(f"blipq:job:{id}")
    assert job["output"] == "s3://results/cat.jpg.json"  # type: ignore[index]
    assert json.loads(job["request"])["image"]["etag"]  # type: ignore[index]
    assert batch.refused == set()


def test_duplicates_are_one_job(rules: MakeRules, client: Client, bucket: str, put: Put) -> None:
    """In one message, in two, and of another process."""
    put("cat.jpg")
    found = Notification(bucket, "cat.jpg")
    for watched in (Watched(rules(), client), Watched(rules(), client)):
        watched.take(Script(found, found), Script(found))
    assert watched.counts == (0, 3, 0, 0)
    assert client.ledger.redis.zcard("blipq:open") == 1


def test_a_version_that_was_replaced_before_it_was_looked_at_has_no_job(
    rules: MakeRules, client: Client, bucket: str, put: Put
) -> None:
    """The event of the old one finds the new one, which has a single job."""
    put("cat.jpg", b"old")
    put("cat.jpg", b"new!")
    watched = Watched(rules(), client)
    watched.take(Script(Notification(bucket, "cat.jpg")), Script(Notification(bucket, "cat.jpg")))
    assert [wanted.upload.size for wanted, _ in watched.told] == [4]


def test_each_rule_that_takes_an_upload_makes_a_job(client: Client, bucket: str, put: Put) -> None:
    put("cat.jpg")
    requests: list[dict[str, Any]] = [
        {"kind": "caption"},
        {"kind": "vqa", "questions": ["what is it?"]},
        {"kind": "match", "texts": ["a cat"]},
        {"kind": "embed"},
    ]
    described = [
        {"name": request["kind"], "bucket": bucket, "request": request} for request in requests
    ]
    watched = Watched(Rules.model_validate({"name": "w", "rules": described}), client)
    watched.take(Script(Notification(bucket, "cat.jpg")))
    assert {wanted.rule.name for wanted, _ in watched.told} == {"caption", "vqa", "match", "embed"}


def test_what_is_gone_or_ours_or_no_rules_is_left_out(
    rules: MakeRules, client: Client, bucket: str, put: Put
) -> None:
    put("in/cat.json")
    put("in/cat.txt")
    put("elsewhere/cat.jpg")
    options = {"output": f"s3://{bucket}/{{stem}}.json"}
    watched = Watched(rules(prefix="in/", suffix=[".jpg", ".json"], options=options), client)
    keys = ["in/gone.jpg", "in/cat.json", "in/cat.txt", "elsewhere/cat.jpg"]
    batch = Script(
        *(Notification(bucket, key) for key in keys), Notification("other-bucket", "in/cat.jpg")
    )
    watched.take(batch)
    assert watched.counts == (0, 0, 5, 0)
    assert batch.refused == set()


def test_the_content_type_is_asked_for_when_a_rule_needs_it(
    rules: MakeRules, client: Client, bucket: str, put: Put
) -> None:
    put("cat", content_type="image/png")
    put("note", content_type="text/plain")
    watched = Watched(rules(content_type="image/*"), client)
    (page,) = watched.watcher.objects.pages(bucket, "")
    watched.take(Script(*page.uploads))
    assert watched.keys == ["cat"]


def test_an_upload_that_can_never_have_a_job_is_refused_and_the_others_go_on(
    rules: MakeRules, client: Client, bucket: str, put: Put
) -> None:
    long = "/".join(["x" * 200] * 3)
    put(long)
    put("cat.jpg")
    watched = Watched(rules(options={"metadata": {"key": "{key} {key}"}}), client)
    batch = Script(Notification(bucket, long), Notification(bucket, "cat.jpg"))
    watched.take(batch)
    assert watched.keys == ["cat.jpg"]
    assert batch.refused == {Notification(bucket, long)}


def test_an_upload_that_had_its_job_before_the_rule_was_changed_has_no_second(
    rules: MakeRules, client: Client, bucket: str, put: Put
) -> None:
    put("cat.jpg")
    put("dog.jpg")
    Watched(rules(), client).take(Script(Notification(bucket, "cat.jpg")))
    changed = Watched(rules(request={"kind": "caption", "prompt": "a photo of"}), client)
    changed.take(Script(Notification(bucket, "cat.jpg"), Notification(bucket, "dog.jpg")))
    assert changed.keys == ["dog.jpg"]
    assert changed.counts == (1, 1, 0, 0)


def test_a_full_queue_slows_it_down_and_loses_nothing(
    rules: MakeRules, client: Client, bucket: str, put: Put, apart: Settings
) -> None:
    for n in range(4):
        put(f"{n}.jpg")
    tight = Client(apart.model_copy(update={"max_open_jobs": 2}))
    watched = Watched(rules(), tight)
    batch = Script(*(Notification(bucket, f"{n}.jpg") for n in range(4)))
    thread = threading.Thread(target=watched.take, args=[batch])
    thread.start()
    deadline = time.monotonic() + 30
    while batch.refused is None and time.monotonic() < deadline:
        for id in client.ledger.redis.zrange("blipq:open", 0, -1):  # type: ignore[union-attr]
            client.ledger.cancel(id)
        time.sleep(0.1)
    thread.join()
    assert watched.counts == (4, 0, 0, 0)
    assert batch.held
    tight.close()


def test_an_outage_of_redis_is_waited_out(
    rules: MakeRules, client: Client, bucket: str, put: Put, monkeypatch: pytest.MonkeyPatch
) -> None:
    put("cat.jpg")
    watched = Watched(rules(), client)
    real, failures = client.ledger.submit_all, iter([1, 1])

    def flaky(jobs: Any) -> Any:
        if next(failures, None):
            raise QueueUnavailable("Redis does not answer")
        return real(jobs)

    monkeypatch.setattr(client.ledger, "submit_all", flaky)
    batch = Script(Notification(bucket, "cat.jpg"))
    watched.take(batch)
    assert watched.keys == ["cat.jpg"]
    assert batch.held == 2


def test_a_stop_in_the_middle_leaves_the_batch_to_the_source(
    rules: MakeRules, client: Client, bucket: str, put: Put, apart: Settings
) -> None:
    put("cat.jpg")
    away = Client(apart.model_copy(update={"redis_url": "redis://127.0.0.1:1/0"}))
    away._services().storage = client.storage
    watched = Watched(rules(), away)
    batch, source = Script(Notification(bucket, "cat.jpg")), None
    source = Scripted(batch)
    thread = threading.Thread(target=watched.watcher.run, args=[source])
    thread.start()
    time.sleep(0.3)
    watched.stop.set()
    thread.join(timeout=30)
    assert not thread.is_alive()
    assert batch.refused is None
    assert source.closed
    away.close()


def test_a_backfill_leaves_out_what_has_its_sidecar(
    rules: MakeRules, client: Client, bucket: str, put: Put
) -> None:
    put("old.jpg")
    put("new.jpg")
    put("results/old.jpg.json", b"{}")
    options = {"output": f"s3://{bucket}/results/{{key}}.json"}
    watched = Watched(rules(suffix=".jpg", options=options), client, window=100)
    (page,) = watched.watcher.objects.pages(bucket, "")
    watched.take(Script(*page.uploads))
    assert watched.keys == ["new.jpg"]


def test_a_backfill_waits_while_too_many_jobs_are_open(
    rules: MakeRules, client: Client, bucket: str, put: Put
) -> None:
    put("cat.jpg")
    other = client.caption("s3://uploads/other.jpg")
    watched = Watched(rules(), client, window=1)
    (page,) = watched.watcher.objects.pages(bucket, "")
    thread = threading.Thread(target=watched.take, args=[Script(*page.uploads)])
    thread.start()
    time.sleep(0.5)
    assert watched.told == []
    other.cancel()
    thread.join(timeout=30)
    assert watched.keys == ["cat.jpg"]


def test_an_upload_that_is_refused_again_and_again_is_told_once(
    rules: MakeRules, client: Client, bucket: str, put: Put, monkeypatch: pytest.MonkeyPatch
) -> None:
    put("cat.jpg")
    watched = Watched(rules(), client)

    def refuse(*_: Any, **__: Any) -> None:
        raise S3Refused("S3 refuses: AccessDenied", Refusal.FORBIDDEN)

    with monkeypatch.context() as patched:
        patched.setattr(client.storage, "head", refuse)
        batches = [Script(Notification(bucket, "cat.jpg")) for _ in range(3)]
        watched.take(*batches)
    assert all(batch.refused == {Notification(bucket, "cat.jpg")} for batch in batches)
    assert watched.counts == (0, 0, 0, 1)
    watched.take(Script(Notification(bucket, "cat.jpg")))
    assert watched.counts == (1, 0, 0, 1)


def test_a_listing_loses_no_upload_to_one_refused_look(
    rules: MakeRules, client: Client, bucket: str, put: Put, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A skewed clock, say: HEAD answers 403 without a word, as it does for a closed bucket."""
    s3, answers = client.storage.client, [403]
    head = s3.head_object

    def once(**which: Any) -> Any:
        if answers:
            status = answers.pop()
            told: Any = {
                "Error": {"Code": str(status)},
                "ResponseMetadata": {"HTTPStatusCode": status},
            }
            raise ClientError(told, "HeadObject")
        return head(**which)

    monkeypatch.setattr(s3, "head_object", once)
    put("cat.jpg")
    watched = Watched(rules(content_type="image/*"), client)
    (page,) = watched.watcher.objects.pages(bucket, "")
    watched.take(Script(*page.uploads))
    assert (watched.keys, watched.counts) == (["cat.jpg"], (1, 0, 0, 0))


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def command(
    apart: Settings, tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """`blipq watch` in this process, with rules for the bucket."""
    for name in ("redis_url", "s3_endpoint_url", "s3_access_key_id"):
        monkeypatch.setenv(f"BLIPQ_{name.upper()}", str(getattr(apart, name)))
    assert apart.s3_secret_access_key is not None
    secret = apart.s3_secret_access_key.get_secret_value()
    monkeypatch.setenv("BLIPQ_S3_SECRET_ACCESS_KEY", secret)
    (tmp_path / "rules.toml").write_text(
        f"""
        name = "w"
        [source]
        state = "{tmp_path}/state.json"
        [[rules]]
        name = "captions"
        bucket = "{bucket}"
        suffix = ".jpg"
        request = {{ kind = "caption" }}
        options = {{ output = "s3://{bucket}/{{key}}.json" }}
        """
    )
    path = str(tmp_path / "rules.toml")
    return lambda *options: CliRunner().invoke(app, ["watch", path, *options])


def test_a_dry_run_shows_the_jobs_and_leaves_no_trace(
    command: Callable[..., Any], client: Client, put: Put, tmp_path: Path
) -> None:
    put("cat.jpg")
    ran = command("--dry-run", "--backfill")
    assert ran.exit_code == 0, ran.output
    assert "cat.jpg  captions  would be submitted" in ran.stdout
    assert client.ledger.redis.zcard("blipq:open") == 0
    assert not (tmp_path / "state.json").exists()


def test_the_command_takes_what_is_there_once(
    command: Callable[..., Any], client: Client, put: Put
) -> None:
    put("cat.jpg")
    ran = command("--backfill", "--once", "--json")
    assert ran.exit_code == 0, ran.output
    told = json.loads(ran.stdout)
    assert client.job(told["id"]).status() == "queued"
    assert told["output"].endswith("/cat.jpg.json")
    again = command("--backfill", "--once")
    assert again.stdout == ""
    assert "0 submitted" in again.stderr


def test_an_output_that_no_worker_may_write_is_told_before_anything_is_watched(
    command: Callable[..., Any], client: Client, put: Put, bucket: str
) -> None:
    put("cat.jpg")
    register(client, outputs=["elsewhere"])
    ran = command("--backfill", "--once")
    assert ran.exit_code == 2
    assert "rule captions: options.output: the workers of 'default' refuse it" in ran.stderr
    assert client.ledger.redis.zcard("blipq:open") == 0
    register(client, outputs=[bucket])
    assert command("--backfill", "--once").exit_code == 0
    assert client.ledger.redis.zcard("blipq:open") == 1


def register(client: Client, **info: Any) -> None:
    """As a live worker does."""
    told = json.dumps({"models": ["default"], "active": 0, **info})
    ledger_of(client).register("w1", ["default"], told, ttl_s=60, spare=True)


def test_sigterm_ends_the_command_in_peace(command: Callable[..., Any], tmp_path: Path) -> None:
    watch = subprocess.Popen(
        [sys.executable, "-m", "blipq", "watch", str(tmp_path / "rules.toml")],
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until((tmp_path / "state.json").exists, "the first listing")
    watch.send_signal(signal.SIGTERM)
    _, told = watch.communicate(timeout=30)
    assert watch.returncode == 0
    assert "0 submitted" in told


def test_wrong_rules_exit_2_before_anything_is_watched(
    command: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "rules.toml").write_text("name = 'w'")
    ran = command()
    assert ran.exit_code == 2
    assert "rules: missing" in ran.stderr


def test_a_webhook_that_may_not_be_posted_to_exits_2(
    command: Callable[..., Any], tmp_path: Path
) -> None:
    path = tmp_path / "rules.toml"
    hook = "options = { webhook = 'http://10.0.0.1/', "
    path.write_text(path.read_text().replace("options = {", hook))
    ran = command("--once")
    assert ran.exit_code == 2
    assert "rule captions: options.webhook" in ran.stderr
