"""Commands that change many jobs: they count, ask, and then act."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from blipq import Client, Settings
from blipq.cli import app
from blipq.ledger.views.actions import ActionLog
from blipq.ledger.worker import Claim, WorkerLedger

IMAGE = "s3://uploads/cat.jpg"

Run = Callable[..., Result]


@pytest.fixture
def run(apart: Settings, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("BLIPQ_REDIS_URL", apart.redis_url)
    return lambda *arguments, **options: CliRunner().invoke(app, list(arguments), **options)


@pytest.fixture
def ids(client: Client) -> list[str]:
    return [client.caption(IMAGE, model="m", metadata={"user": user}).id for user in "aab"]


def test_a_dry_run_counts_and_changes_nothing(run: Run, ids: list[str], client: Client) -> None:
    ran = run("cancel", "--metadata", "user=a", "--dry-run")
    assert (ran.exit_code, ran.stdout) == (0, "2 would be cancelled\n")
    assert {client.job(id).status() for id in ids} == {"queued"}


def test_a_change_of_nothing_named_says_how_to_name_jobs(run: Run) -> None:
    ran = run("retry")
    assert ran.exit_code == 2
    assert "which jobs? Name ids, or a filter such as --status failed" in ran.stderr


def test_a_change_of_all_that_match_asks_first(run: Run, ids: list[str], client: Client) -> None:
    ran = run("cancel", "--metadata", "user=a", input="n\n")
    assert "2 jobs: are all of them to be cancelled?" in ran.stderr
    assert ran.exit_code != 0
    assert client.job(ids[0]).status() == "queued"
    ran = run("cancel", "--metadata", "user=a", input="y\n")
    assert ran.stdout.endswith("2 cancelled\n")
    assert [client.job(id).status() for id in ids] == ["cancelled", "cancelled", "queued"]


def test_many_ids_say_how_many_it_was_not_for(run: Run, ids: list[str], client: Client) -> None:
    client.job(ids[0]).cancel()
    ran = run("cancel", *ids, "job_unknown")
    assert ran.stdout == "2 cancelled\n"
    assert "2 are unknown, or not in a state for it" in ran.stderr


def test_jobs_are_queued_again_and_moved(run: Run, ids: list[str], client: Client) -> None:
    assert run("retry", ids[0]).stdout == "it is queued\n"
    client.job(ids[0]).cancel()
    assert run("retry", ids[0]).stdout == "queued again\n"
    ran = run("expedite", "--model", "m", "--to", "low", "--yes", "--json")
    assert json.loads(ran.stdout) == {"moved": 3}
    assert json.loads(run("expedite", ids[0], "--json").stdout) == {
        "id": ids[0],
        "moved": True,
        "status": "queued",
    }


@pytest.mark.parametrize("arguments", [(), ("job_1", "--model", "m")])
def test_jobs_are_named_by_ids_or_by_a_filter(run: Run, arguments: tuple[str, ...]) -> None:
    assert run("cancel", *arguments, "--yes").exit_code == 2


def test_queues_are_paused_and_resumed(run: Run, ids: list[str]) -> None:
    assert run("queue", "pause", "blipq.m.normal").stdout == "blipq.m.normal: paused, 3 waiting\n"
    _, line = run("queue", "stats").stdout.splitlines()
    assert line.split() == ["blipq.m.normal", "3", "0", "s", "0", "paused"]
    assert "resumed, 3 waiting" in run("queue", "resume", "blipq.m.normal").stdout
    assert "paused" not in run("queue", "stats").stdout
    assert run("queue", "pause", "blipq.typo.low").exit_code == 2


def dead_letter(client: Client, ledger: WorkerLedger, **options: Any) -> str:
    id = client.caption(IMAGE, model="m", **options).id
    claimed = ledger.claim(id, "w1")
    assert isinstance(claimed, Claim)
    assert ledger.fail(claimed, '{"code": "internal", "message": "no"}', "{}", dead=True)
    return id


@pytest.mark.parametrize(
    ("command", "action"),
    [
        (("dead-letters", "retry"), "retry"),
        (("dead-letters", "drop"), "drop"),
        (("webhooks", "replay"), "replay"),
    ],
)
def test_a_command_for_many_ids_is_one_line_of_the_log_and_names_those_that_are_unknown(
    run: Run,
    client: Client,
    ledger: WorkerLedger,
    command: tuple[str, str],
    action: str,
) -> None:
    """Before, it was a line for each, and none behind an unknown id was done."""
    hook = {"url": "https://example.org/"}
    ids = [dead_letter(client, ledger, webhook=hook) for _ in range(2)]
    ran = run(*command, ids[0], "job_unknown", ids[1])
    assert (ran.exit_code, len(ran.stdout.splitlines())) == (4, 2)
    assert "job_unknown" in ran.stderr
    assert all(id in ran.stdout and id not in ran.stderr for id in ids)
    (line,) = ActionLog.beside(ledger).latest(10)
    assert (line.via, line.action, line.count) == ("cli", action, 2)
    assert line.target == " ".join([ids[0], "job_unknown", ids[1]])
