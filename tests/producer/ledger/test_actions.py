"""The log of actions: by client, command and door, with the action or not at all."""

import asyncio
import getpass
import socket
from contextvars import Context
from datetime import UTC, datetime, timedelta

import pytest
import redis

from blipq import AsyncClient, Client, JobFilter, Settings
from blipq.ledger.acting import acting
from blipq.ledger.changes import Changed, Chunk
from blipq.ledger.operator import OperatorLedger
from blipq.ledger.views.actions import ActionLog
from blipq.ledger.worker import Claim, WorkerLedger
from blipq.webhooks.outbox import Outbox

IMAGE = "s3://photos/cat.jpg"
ERROR = '{"code": "internal", "message": "no", "retryable": true}'
ME = f"{getpass.getuser()}@{socket.gethostname()}"


@pytest.fixture
def log(ledger: WorkerLedger) -> ActionLog:
    return ActionLog.beside(ledger)


def lines(log: ActionLog) -> list[tuple[str, str, str, str, int]]:
    """The oldest first, without times."""
    found = reversed(log.latest(100))
    return [(each.name, each.via, each.action, each.target, each.count) for each in found]


def dead_letter(client: Client, ledger: WorkerLedger, webhook: str | None = None) -> str:
    hook = None if webhook is None else {"url": webhook}
    id = client.caption(IMAGE, webhook=hook).id
    claimed = ledger.claim(id, "w1")
    assert isinstance(claimed, Claim)
    assert ledger.fail(claimed, ERROR, "{}", dead=True)
    return id


def test_each_action_is_noted_with_who_did_it(
    client: Client, ledger: WorkerLedger, log: ActionLog
) -> None:
    operator, outbox = OperatorLedger.beside(ledger), Outbox.beside(ledger)
    first, second = client.caption(IMAGE).id, client.caption(IMAGE).id
    client.job(first).cancel()
    dead, dropped = dead_letter(client, ledger, "https://example.org/"), dead_letter(client, ledger)
    with acting("shop", "api"):
        (event,) = outbox.replay(dead)
        assert operator.retry_dead_letter(dead)
        assert operator.drop_dead_letter(dropped)
    with acting("ann@host", "cli"):
        assert operator.purge("blipq.default.normal") == 2
        assert operator.delete(second)
    assert lines(log) == [
        (ME, "client", "cancel", first, 1),
        ("shop", "api", "replay", event, 1),
        ("shop", "api", "retry", dead, 1),
        ("shop", "api", "drop", dropped, 1),
        ("ann@host", "cli", "purge", "blipq.default.normal", 2),
        ("ann@host", "cli", "forget", second, 1),
    ]
    now = datetime.now(UTC)
    assert all(now - timedelta(minutes=1) < each.at <= now for each in log.latest(100))


def test_a_client_of_an_event_loop_is_noted_too(apart: Settings, log: ActionLog) -> None:
    async def cancelled() -> str:
        async with AsyncClient(apart) as client:
            job = await client.caption(IMAGE)
            with acting("shop", "api"):
                await job.cancel()
            return job.id

    id = asyncio.run(cancelled())
    assert lines(log) == [("shop", "api", "cancel", id, 1)]


def test_pauses_changes_of_many_and_erasures_are_noted_and_dry_runs_are_not(
    client: Client, log: ActionLog
) -> None:
    queue = "blipq.default.normal"
    ids = [client.caption(IMAGE, metadata={"order": "secret"}).id for _ in range(3)]
    client.pause(queue)
    client.resume(queue)
    where = JobFilter(model="default", metadata={"order": "secret"})
    assert client.cancel_all(where, dry_run=True) == 3
    assert client.cancel_all(ids[:1]) == 1
    assert client.cancel_all(where) == 2
    client.forget(ids[:1])
    found = [(action, target, count) for _, _, action, target, count in lines(log)]
    assert found == [
        ("pause", queue, 1),
        ("resume", queue, 1),
        ("cancel", ids[0], 1),
        ("cancel", '{"model": "default", "metadata": ["order"]}', 2),
        ("forget", ids[0], 1),
    ]


def test_a_command_for_many_jobs_is_one_line_beside_those_of_others(
    client: Client, ledger: WorkerLedger, log: ActionLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line for each of its parts would push out what is older."""
    monkeypatch.setattr("blipq.ledger.changes.CHUNK", 2)
    monkeypatch.setattr("blipq.ledger.operator.CHUNK", 2)
    monkeypatch.setattr("blipq.client.sync_client.ERASED_AT_ONCE", 2)
    ids = [client.caption(IMAGE).id for _ in range(7)]
    others = client.caption(IMAGE, model="default", priority="high").id

    def cancel() -> None:
        with acting("bob", "cli"):
            ledger.cancel(others)

    def change(chunk: Chunk) -> Changed:
        Context().run(cancel)  # by somebody else, in the midst of it
        return plain(chunk)

    plain = client.ledger.change
    monkeypatch.setattr(client.ledger, "change", change)
    assert client.cancel_all(ids) == 7
    where = JobFilter(status="cancelled", priority="normal")
    assert client.retry_all(where) == 7
    assert OperatorLedger.beside(ledger).purge("blipq.default.normal") == 7
    assert len(client.forget(where).jobs) == 7
    found = [(name, action, target, count) for name, _, action, target, count in lines(log)]
    told = '{"status": "cancelled", "priority": "normal"}'
    assert [each for each in found if each[0] == "bob"] == [("bob", "cancel", others, 1)]
    assert sorted(each[1:] for each in found if each[0] == ME) == [
        ("cancel", " ".join(ids[:2]), 7),
        ("forget", told, 7),
        ("purge", "blipq.default.normal", 7),
        ("retry", told, 7),
    ]


def test_what_came_to_nothing_is_not_noted(
    client: Client, ledger: WorkerLedger, log: ActionLog
) -> None:
    operator = OperatorLedger.beside(ledger)
    job = client.caption(IMAGE)
    assert job.cancel()
    assert not job.cancel()
    assert ledger.cancel("job_unknown") == "unknown"
    assert operator.retry_dead_letter(job.id) is None
    assert not operator.drop_dead_letter("job_unknown")
    assert not operator.delete("job_unknown")
    assert Outbox.beside(ledger).replay("job_unknown/job.failed") == []
    assert [line[2] for line in lines(log)] == ["cancel"]
    client.ledger.release([job.id])  # a program's own housekeeping is no action of anybody
    assert len(lines(log)) == 1


def test_the_log_is_read_in_pages_and_has_a_bound_and_an_end(
    client: Client, log: ActionLog, raw_redis: "redis.Redis"
) -> None:
    for n in range(5):
        fields = {"name": "a", "via": "cli", "action": "drop", "target": str(n), "count": 1}
        raw_redis.xadd("blipq:actions", fields, id=f"{n + 1}-0")  # long ago
    raw_redis.expire("blipq:actions", 60)
    first = log.latest(3)
    assert [each.target for each in first] == ["4", "3", "2"]
    assert [each.target for each in log.latest(3, first[-1].id)] == ["1", "0"]
    job = client.caption("s3://photos/" + "x" * 500)
    job.cancel()
    assert log.latest(1)[0].target == job.id
    assert 29 * 86400 < raw_redis.ttl("blipq:actions") <= 30 * 86400
    pipeline = raw_redis.pipeline(transaction=False)
    for _ in range(11_000):
        pipeline.xadd("blipq:actions", fields)
    pipeline.execute()
    client.caption(IMAGE).cancel()
    assert raw_redis.xlen("blipq:actions") <= 10_200
    assert raw_redis.xrange("blipq:actions", count=1)[0][0] > "1000"
