"""Many jobs at a glance: list, wait, and the queues."""

import json
from collections.abc import Callable

import pytest
import redis
from typer.testing import CliRunner, Result

from blipq import Client, JobInfo, Settings
from blipq.cli import app
from blipq.ledger.operator import OperatorLedger
from blipq.ledger.worker import Claim, WorkerLedger

IMAGE = "s3://uploads/cat.jpg"
CAPTION = json.dumps({"kind": "caption", "captions": [{"text": "a cat"}]})
ERROR = json.dumps({"code": "image_not_found", "message": "no such key"})

Run = Callable[..., Result]


@pytest.fixture
def run(apart: Settings, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("BLIPQ_REDIS_URL", apart.redis_url)
    return lambda *arguments, **options: CliRunner().invoke(app, list(arguments), **options)


def claimed(ledger: WorkerLedger, id: str) -> Claim:
    claim = ledger.claim(id, "w1")
    assert isinstance(claim, Claim)
    return claim


@pytest.fixture
def jobs(client: Client, ledger: WorkerLedger) -> dict[str, str]:
    """A job of each status, in this order."""
    ids = {
        name: client.caption(IMAGE, model="m").id
        for name in ("succeeded", "failed", "cancelled", "running", "queued")
    }
    ledger.succeed(claimed(ledger, ids["succeeded"]), CAPTION, "{}")
    ledger.fail(claimed(ledger, ids["failed"]), ERROR, "{}")
    ledger.cancel(ids["cancelled"])
    claimed(ledger, ids["running"])
    return ids


def listed(ran: Result) -> list[JobInfo]:
    assert ran.exit_code == 0, ran.output
    return [JobInfo.model_validate(each) for each in json.loads(ran.stdout)["jobs"]]


def test_jobs_are_listed_the_newest_first(run: Run, jobs: dict[str, str]) -> None:
    found = listed(run("list", "--json"))
    assert {info.id for info in found} == set(jobs.values())
    assert [info.created_at for info in found] == sorted(
        (info.created_at for info in found), reverse=True
    )
    assert len(listed(run("list", "--json", "--limit", "2"))) == 2


@pytest.mark.parametrize("status", ["succeeded", "failed", "cancelled", "running", "queued"])
def test_jobs_are_listed_by_status(run: Run, jobs: dict[str, str], status: str) -> None:
    assert [info.id for info in listed(run("list", "--status", status, "--json"))] == [jobs[status]]


def test_jobs_are_listed_by_model(run: Run, jobs: dict[str, str], client: Client) -> None:
    other = client.caption(IMAGE, model="other").id
    assert [info.id for info in listed(run("list", "--model", "other", "--json"))] == [other]


def test_a_list_for_people_says_what_failed(run: Run, jobs: dict[str, str]) -> None:
    first, second = run("list", "--status", "failed").stdout.splitlines()
    assert first.endswith(f"caption   failed     {jobs['failed']}")
    assert second.strip() == "cat.jpg: failed (image_not_found: no such key)"


def test_a_list_for_people_shows_picture_and_answer_and_fits_80_columns(
    run: Run, jobs: dict[str, str], client: Client
) -> None:
    shown = run("list").stdout.splitlines()
    assert len(shown) == 2 * len(jobs)
    assert all(len(line) <= 80 for line in shown[::2])
    assert "cat.jpg: a cat" in [line.strip() for line in shown]
    digest = "0123456789abcdef" * 4
    client.caption(f"s3://blipq-inbox/{digest}.png", model="other")
    assert "01234567....png: queued" in run("list", "--model", "other").stdout


def test_the_image_of_a_job_is_told_without_the_signature_of_its_url(
    run: Run, client: Client
) -> None:
    id = client.caption("https://example.org/cat.jpg?X-Signature=hidden", model="m").id
    assert client.job(id).info().image == "https://example.org/cat.jpg"
    assert "hidden" not in run("list").stdout + run("list", "--json").stdout


def test_lists_are_one_object_of_json_even_when_empty(run: Run) -> None:
    assert json.loads(run("list", "--json").stdout) == {"jobs": []}
    assert json.loads(run("dead-letters", "list", "--json").stdout) == {"jobs": []}


def test_lists_that_are_empty_say_so(run: Run) -> None:
    assert run("list").stdout == "no jobs\n"
    assert run("dead-letters", "list").stdout == "no dead letters\n"


@pytest.mark.parametrize(
    ("names", "code"),
    [
        (("succeeded",), 0),
        (("succeeded", "failed", "cancelled"), 3),
        (("cancelled", "failed"), 6),
    ],
)
def test_wait_exits_by_the_first_that_did_not_succeed(
    run: Run, jobs: dict[str, str], names: tuple[str, ...], code: int
) -> None:
    ran = run("wait", *(jobs[name] for name in names), "--json")
    assert ran.exit_code == code
    assert [json.loads(line)["status"] for line in ran.stdout.splitlines()] == list(names)


def test_wait_for_a_job_that_goes_on_exits_5(run: Run, jobs: dict[str, str]) -> None:
    assert run("wait", jobs["succeeded"], jobs["queued"], "--timeout", "0.1").exit_code == 5


def test_queues_say_what_waits_and_for_whom(run: Run, jobs: dict[str, str]) -> None:
    told = json.loads(run("queue", "stats", "--json").stdout)
    assert (told["open"], told["running"], told["delayed"]) == (2, 1, 0)
    (queue,) = told["queues"]
    assert (queue["queue"], queue["waiting"]) == ("blipq.m.normal", 1)
    assert 0 <= queue["oldest_s"] < 60
    assert queue["live_workers"] == 0
    heading, line = run("queue", "stats").stdout.splitlines()
    assert line.split()[:2] == ["blipq.m.normal", "1"]
    assert len(heading.rstrip()) == len(line.rstrip()) <= 80, "numbers stand under their names"


def test_purging_a_queue_that_is_not_there_names_those_that_are(
    run: Run, jobs: dict[str, str]
) -> None:
    ran = run("queue", "purge", "nosuch", "--yes")
    assert ran.exit_code == 2
    assert "there is no queue 'nosuch'; there are: blipq.m.normal" in ran.stderr


def test_a_purge_asks_first(run: Run, jobs: dict[str, str], client: Client) -> None:
    ran = run("queue", "purge", "blipq.m.normal", input="n\n")
    assert ran.exit_code == 1
    assert "Cancel 1 jobs" in ran.stderr
    assert client.job(jobs["queued"]).status() == "queued"


def test_a_purge_cancels_what_waits_and_nothing_else(
    run: Run, jobs: dict[str, str], client: Client
) -> None:
    ran = run("queue", "purge", "blipq.m.normal", "--yes", "--json")
    assert json.loads(ran.stdout) == {"queue": "blipq.m.normal", "cancelled": 1}
    assert client.job(jobs["queued"]).status() == "cancelled"
    assert client.job(jobs["running"]).status() == "running"


def test_a_purge_ends_beside_stale_entries(client: Client, raw_redis: "redis.Redis") -> None:
    """An entry without a job must not be found again and again."""
    raw_redis.zadd("blipq:queued:q", {"job_gone": 1})
    assert OperatorLedger.beside(client.ledger).purge("q") == 0
    assert not raw_redis.exists("blipq:queued:q")


def test_a_collected_job_is_forgotten_but_not_an_open_one(
    client: Client, ledger: WorkerLedger, jobs: dict[str, str]
) -> None:
    assert ledger.release(list(jobs.values())) == 3
    assert ledger.read(jobs["succeeded"]) is None
    assert ledger.read(jobs["queued"]) is not None


def test_a_released_job_stays_while_its_webhook_waits(client: Client, ledger: WorkerLedger) -> None:
    job = client.caption(IMAGE, webhook={"url": "https://example.org/hook"})
    job.cancel()
    assert ledger.release([job.id]) == 0
    assert job.status() == "cancelled"


def test_a_dead_letter_is_not_released(client: Client, ledger: WorkerLedger) -> None:
    id = client.caption(IMAGE).id
    ledger.fail(claimed(ledger, id), ERROR, "{}", dead=True)
    assert ledger.release([id]) == 0


def test_tenants_are_limited_and_shown_with_what_they_have(run: Run, apart: Settings) -> None:
    with Client(apart) as client:
        for tenant in ("shop", "shop", "zoo"):
            client.caption(IMAGE, tenant=tenant)
    ran = run("queue", "limit", "shop", "--open-jobs", "1000", "--rate", "2.5")
    assert ran.stdout == "shop: 1,000 open jobs, 2.5 jobs a second\n"
    shop, zoo = json.loads(run("queue", "stats", "--by", "tenant", "--json").stdout)["tenants"]
    assert 0 < shop.pop("oldest_s") < 60
    assert shop == {"tenant": "shop", "open": 2, "most_open": 1000, "most_per_s": 2.5}
    assert (zoo["tenant"], zoo["open"], zoo["most_open"]) == ("zoo", 1, None)
    heading, line, _ = run("queue", "stats", "--by", "tenant").stdout.splitlines()
    assert heading.split()[:3] == ["tenant", "open", "oldest"]
    assert line.split() == ["shop", "2", "0", "s", "1,000", "2.5"]
    assert run("queue", "limit", "shop").stdout == "shop: no limits of its own\n"
    assert run("queue", "limit", "a:b", "--open-jobs", "1").exit_code == 2


def test_a_limit_says_that_the_other_one_is_gone(run: Run) -> None:
    run("queue", "limit", "shop", "--open-jobs", "1000")
    rate = "shop: any number of open jobs, 50 jobs a second"
    assert run("queue", "limit", "shop", "--rate", "50").stdout == f"{rate}\n"
    open_jobs = "shop: 1,000 open jobs, any number of jobs a second"
    assert run("queue", "limit", "shop", "--open-jobs", "1000").stdout == f"{open_jobs}\n"
    noted = json.loads(run("log", "--json").stdout)["actions"]
    assert [each["target"] for each in noted][:2] == [open_jobs, rate]
