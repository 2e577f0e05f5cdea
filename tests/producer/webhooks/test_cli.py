"""`blipq webhooks` and the settings behind it."""

import json
from collections.abc import Callable

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner, Result

from blipq import Settings
from blipq.cli import app
from blipq.ops.doctor.workers import check_webhooks
from blipq.webhooks.delivery import tenant_secret
from blipq.webhooks.outbox import Outbox
from conftest import wait_until
from producer.webhooks.conftest import End, sending
from receivers import SECRET, Receiver

Run = Callable[..., Result]


@pytest.fixture
def run(hooked: Settings, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("BLIPQ_REDIS_URL", hooked.redis_url)
    monkeypatch.setenv("BLIPQ_WEBHOOK_ALLOW", "127.0.0.1")
    monkeypatch.setenv("BLIPQ_WEBHOOK_SECRETS", SECRET)
    return lambda *arguments: CliRunner().invoke(app, ["webhooks", *arguments])


def test_list_shows_what_waits_and_counts_what_came_of_attempts(
    run: Run, hooked: Settings, outbox: Outbox, receiver: Receiver, end: End
) -> None:
    receiver.behave = lambda got: 410 if got.path == "/gone" else 200
    end(receiver.url)
    gone = end(receiver.url.replace("/hook", "/gone"))
    waiting = json.loads(run("list", "--json").stdout)
    assert (waiting["pending"], len(waiting["events"]), waiting["attempts"]) == (2, 2, {})
    with sending(hooked):
        wait_until(lambda: outbox.pending() == 0, "every event to be settled")
        told = json.loads(run("list", "--dead", "--json").stdout)
    assert (told["pending"], told["dead"], len(told["senders"])) == (0, 1, 1)
    assert told["attempts"] == {"delivered": 1, "gone": 1}
    assert (told["events"][0]["job_id"], told["events"][0]["outcome"]) == (gone, "gone")
    assert "gone: HTTP 410" in run("list", "--dead").stdout


def test_list_shows_no_token_of_a_receivers_url(run: Run, outbox: Outbox, end: End) -> None:
    end("https://example.org/hook?token=hush&team=blue")
    assert outbox.listed(dead=False, limit=1)[0]["url"].endswith("?token=hush&team=blue")
    for arguments in ([], ["--json"]):
        told = run("list", *arguments).stdout
        assert "https://example.org/hook?token=***&team=blue" in told
        assert "hush" not in told


def test_replay_takes_a_job_an_event_or_a_webhook_id(run: Run, outbox: Outbox, end: End) -> None:
    id = end("https://example.org/")
    (listed,) = outbox.listed(dead=False, limit=1)
    for name in (id, f"{id}/job.succeeded", listed["webhook_id"]):
        ran = run("replay", name)
        assert (ran.exit_code, ran.stdout) == (0, f"{id}/job.succeeded: queued\n"), ran
    assert run("replay", "job_unknown").exit_code == 4


def test_test_says_what_a_receiver_answers(run: Run, receiver: Receiver) -> None:
    assert run("test", receiver.url).exit_code == 0
    receiver.behave = lambda got: 500
    ran = run("test", receiver.url, "--json")
    assert (ran.exit_code, json.loads(ran.stdout)["outcome"]) == (1, "refused")
    forbidden = run("test", "https://10.0.0.1/")
    assert (forbidden.exit_code, "url_forbidden" in forbidden.stdout) == (1, True)


def test_without_a_secret_nothing_runs(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BLIPQ_WEBHOOK_SECRETS")
    for arguments in (["run"], ["test", "https://example.org/"], ["secret", "of", "shop"]):
        ran = run(*arguments)
        assert (ran.exit_code, "BLIPQ_WEBHOOK_SECRETS" in ran.stderr) == (2, True)
        assert "webhooks secret new" in ran.stderr


def test_a_new_secret_is_one_that_the_settings_take(run: Run) -> None:
    secret = run("secret", "new").stdout.strip()
    (taken,) = Settings(webhook_secrets=secret).webhook_secrets  # type: ignore[arg-type]
    assert taken.get_secret_value() == secret
    for wrong in ("whsec_c2hvcnQ=", secret.removeprefix("whsec_"), "whsec_!"):
        with pytest.raises(ValidationError, match="whsec_ and 24 to 64 bytes"):
            Settings(webhook_secrets=wrong)  # type: ignore[arg-type]


def test_a_tenants_secrets_are_printed_and_are_ones_that_receivers_take(run: Run) -> None:
    ran = run("secret", "of", "shop")
    assert ran.exit_code == 0
    (secret,) = ran.stdout.split()
    assert secret == tenant_secret(SECRET, "shop")
    assert Settings(webhook_secrets=secret).webhook_secrets  # type: ignore[arg-type]
    assert run("secret", "of", "zoo").stdout.strip() != secret
    assert run("secret", "of", "a:b").exit_code == 2


def test_the_ladder_is_read_with_units_and_starts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLIPQ_WEBHOOK_LADDER", "0,5s,5m,2h")
    assert Settings().webhook_ladder == (0, 5, 300, 7200)
    monkeypatch.setenv("BLIPQ_WEBHOOK_LADDER", "5s")
    with pytest.raises(ValidationError, match="start with 0"):
        Settings()


def test_the_doctor_says_that_events_wait_and_nobody_sends(
    hooked: Settings, outbox: Outbox, end: End
) -> None:
    end("https://example.org/")
    (waiting,) = check_webhooks(hooked)
    assert (waiting.state, waiting.message) == ("warn", "1 events wait, 0 live senders")
    outbox.register("s1", 5)
    assert [finding.state for finding in check_webhooks(hooked)] == ["ok"]
