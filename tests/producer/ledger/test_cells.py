"""One ledger over several cells: real servers, of which some go away."""

import asyncio
import base64
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from blipq import (
    AsyncClient,
    CaptionRequest,
    Client,
    IdempotencyConflict,
    InvalidRequest,
    JobFilter,
    Options,
    QueueUnavailable,
    Status,
    UnknownModel,
)
from blipq.ledger import keys
from blipq.ledger.cells.calls import Round
from blipq.ledger.cells.fleet import Fleet as Calls
from blipq.ledger.cells.operator import actions_of, beside_each, home_of, operator_of, runs_of
from blipq.ledger.connection import connect
from blipq.ledger.views.listing import Place, Wanted
from blipq.ledger.views.runs import Run, Runs
from blipq.ledger.worker import WorkerLedger
from blipq.redis.cells import Cells, cell_of, ranked
from blipq.submission import Submission, new_id
from conftest import wait_until
from guarantees.cells.fleet import Fleet, finish

REQUEST = CaptionRequest(image="s3://bucket/key")


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path, "abc")
    yield fleet
    fleet.stop()


@pytest.fixture
def client(fleet: Fleet) -> Iterator[Client]:
    with Client(fleet.settings()) as client:
        yield client


def keyed(key: str, **options: Any) -> Options:
    return Options(idempotency_key=key, **options)


def key_in(order: str) -> str:
    """A key whose cells by rank these are."""
    return next(f"k{n}" for n in range(1000) if ranked(f"k{n}", order) == list(order))


def serve(fleet: Fleet, cell: str, model: str) -> None:
    """A worker of a cell serves a model."""
    own = fleet.settings().in_cell(cell)
    with connect(own) as raw:
        WorkerLedger(raw, own).register("w", (model,), "{}", ttl_s=60, spare=False)


def key_of(cell: str, names: str = "abc") -> str:
    """A key that belongs to a cell."""
    return next(f"k{n}" for n in range(1000) if ranked(f"k{n}", names)[0] == cell)


def test_a_job_is_in_the_cell_that_its_id_says_and_is_found_there(
    fleet: Fleet, client: Client
) -> None:
    jobs = client.submit_many(REQUEST for _ in range(60))
    found = fleet.records()
    for job in jobs:
        assert job.id in found[str(cell_of(job.id))]
        assert job.info().status == "queued"
    assert sum(map(len, found.values())) == 60
    assert all(found.values()), "each cell has a share"
    assert jobs[0].cancel()
    assert client.count(JobFilter(status=Status.QUEUED)) == 59


def test_an_id_is_made_without_a_call_where_its_cell_answered_just_now(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blipq.ledger.cells.health.FRESH_S", 3600.0)
    calls = Calls(fleet.settings())
    for cell in "ab":
        calls.health.answered(cell)
        calls.health.learn(cell, "default", True)
    made = [calls.make_id(Options()) for _ in range(900)]
    found = Counter(cell_of(each) if isinstance(each, str) else "calls" for each in made)
    assert found.keys() == {"a", "b", "calls"}
    assert min(found.values()) > 200


def test_an_id_of_a_job_with_a_key_says_the_cell_of_the_key(fleet: Fleet) -> None:
    calls = Calls(fleet.settings())
    for cell in "abc":
        assert cell_of(str(calls.make_id(keyed(key_of(cell))))) == cell


def test_a_job_is_published_in_the_cell_that_records_it(fleet: Fleet, client: Client) -> None:
    jobs = [*client.submit_many(REQUEST for _ in range(20)), client.submit(REQUEST)]
    jobs += [client.submit(REQUEST, keyed(f"k{n}")) for n in range(10) for _ in range(2)]
    jobs += [client.submit(REQUEST, id=f"order-{n}") for n in range(10)]
    published = {}
    for cell, records in fleet.records().items():
        with connect(fleet.settings().in_cell(cell)) as raw:
            texts: Any = raw.lrange("blipq.default.normal", 0, -1)
        bodies = [json.loads(base64.b64decode(json.loads(each)["body"])) for each in texts]
        published[cell] = sorted(id for ((id,), _, _) in bodies)
        assert published[cell] == sorted(records)
    assert sum(map(len, published.values())) == len({job.id for job in jobs}) == 41


def test_a_job_of_cells_with_other_brokers_is_published_there(fleet: Fleet) -> None:
    brokers = dict.fromkeys("abc", "memory://")
    settings = fleet.settings().model_copy(update={"cell_brokers": brokers})
    with Client(settings) as client:
        client.submit_many([REQUEST] * 10)
    for name in "abc":
        with connect(settings.in_cell(name)) as raw:
            assert not raw.exists("blipq.default.normal")


def test_a_key_is_one_job_for_every_client(fleet: Fleet, client: Client) -> None:
    with Client(fleet.settings()) as other:
        jobs = [c.submit(REQUEST, keyed(f"k{n}")) for n in range(20) for c in (client, other)]
    assert len(jobs) == 40
    assert len({job.id for job in jobs}) == 20
    assert sum(map(len, fleet.records().values())) == 20


def test_an_id_of_ones_own_is_one_job_and_found_again(fleet: Fleet, client: Client) -> None:
    ids = [f"order-{n}" for n in range(20)]
    for _ in range(2):
        for id in ids:
            assert client.submit(REQUEST, id=id).id == id
    assert sum(map(len, fleet.records().values())) == 20
    assert {client.job(id).info().id for id in ids} == set(ids)
    assert client.cancel_all(ids) == 20


def test_an_id_of_ones_own_and_a_key_for_one_job_are_refused(fleet: Fleet, client: Client) -> None:
    async def scenario() -> None:
        async with AsyncClient(fleet.settings()) as client:
            with pytest.raises(InvalidRequest, match="not both"):
                await client.submit(REQUEST, keyed("k"), id="order-k")

    asyncio.run(scenario())
    submission = Submission(REQUEST, keyed("k"), "order-k")
    for ask in (
        lambda: client.submit(submission),
        lambda: client.submit(REQUEST, keyed("k"), id="order-k"),
        lambda: client.submit_many([submission]),
    ):
        with pytest.raises(InvalidRequest, match="not both"):
            ask()
    assert sum(map(len, fleet.records().values())) == 0
    job = client.submit(REQUEST, keyed("k"), id=new_id())  # as after a QueueUnavailable
    assert client.submit(REQUEST, keyed("k")) == job


def test_a_job_that_no_cell_has_is_unknown(client: Client) -> None:
    assert client.ledger.read("order-1") is None
    assert client.ledger.cancel(new_id()) == "unknown"


def test_an_id_of_a_cell_that_is_not_named_is_no_missing_job(fleet: Fleet) -> None:
    id = f"{new_id()}_z"
    with (
        Client(fleet.settings()) as client,
        pytest.raises(QueueUnavailable, match="which BLIPQ_CELLS does not name"),
    ):
        client.job(id).info()


def test_jobs_without_a_key_move_when_a_cell_is_away_and_others_wait_for_it(
    fleet: Fleet, client: Client
) -> None:
    first = client.submit_many(REQUEST for _ in range(30))
    key, id = key_of("b"), key_of("b")
    fleet.kill("b")
    later = [client.submit(REQUEST) for _ in range(30)]
    assert {cell_of(job.id) for job in later} == {"a", "c"}
    for ask in (lambda: client.submit(REQUEST, keyed(key)), lambda: client.submit(REQUEST, id=id)):
        with pytest.raises(QueueUnavailable):
            ask()
    fleet.start("b")
    assert {job.info().status for job in first} == {"queued"}
    assert cell_of(client.submit(REQUEST, keyed(key)).id) == "b"
    wait_until(
        lambda: "b" in {cell_of(client.submit(REQUEST).id) for _ in range(20)}, "jobs in b again"
    )


def test_outcomes_of_other_cells_come_while_one_is_away(fleet: Fleet, client: Client) -> None:
    jobs = client.submit_many(REQUEST for _ in range(30))
    by_cell = {name: [j for j in jobs if cell_of(j.id) == name] for name in "abc"}
    fleet.kill("b")
    for name in "ac":
        for job in by_cell[name]:
            finish(fleet, job.id, name)
    coming = client.as_completed(jobs, timeout=10)
    ended = {next(coming).id for name in "ac" for _ in by_cell[name]}
    with pytest.raises(QueueUnavailable):
        next(coming)
    assert ended == {job.id for name in "ac" for job in by_cell[name]}
    fleet.start("b")
    for job in by_cell["b"]:
        finish(fleet, job.id, "b")
    assert {job.result(timeout=30).text for job in jobs} == {"a cat"}


def test_an_id_of_a_cell_that_is_not_named_holds_up_no_other_job(
    fleet: Fleet, client: Client
) -> None:
    job = client.submit(REQUEST, keyed(key_of("a")))
    finish(fleet, job.id, "a")
    unnamed = client.job(f"{new_id()}_z")
    coming = client.as_completed([unnamed, job], timeout=30)
    assert next(coming).id == job.id
    with pytest.raises(QueueUnavailable, match="which BLIPQ_CELLS does not name"):
        next(coming)


def test_a_cell_that_did_not_answer_is_asked_last(fleet: Fleet) -> None:
    calls = Calls(fleet.settings())
    calls.health.failed("a", QueueUnavailable("away"))
    asked = {
        "check": Round(calls.check_models(()), calls.health),
        "read": Round(calls.read(key_of("a")), calls.health),
        "cancel": Round(calls.cancel(key_of("a")), calls.health),
        "model": Round(calls.check_models(("large",)), calls.health),
    }
    first = {name: round.call.cell for name, round in asked.items() if round.call}
    assert first.keys() == asked.keys()
    assert "a" not in first.values()


def test_a_queue_is_paused_in_the_cells_behind_one_that_is_away(
    fleet: Fleet, client: Client
) -> None:
    queue = "blipq.default.normal"

    def is_paused(cell: str) -> bool:
        with connect(fleet.settings().in_cell(cell)) as raw:
            return raw.get(keys.paused(queue)) == "0"

    fleet.kill("a")
    with pytest.raises(QueueUnavailable):
        client.pause(queue)
    assert [is_paused(cell) for cell in "bc"] == [True, True]
    with pytest.raises(QueueUnavailable):
        client.resume(queue)
    assert [is_paused(cell) for cell in "bc"] == [False, False]


def test_a_model_that_one_cell_alone_knows_has_its_jobs_there(fleet: Fleet) -> None:
    settings = fleet.settings(known_models=("default",))
    own = fleet.settings().in_cell("c")
    with connect(own) as raw:
        WorkerLedger(raw, own).register("w", ("large",), "{}", ttl_s=60, spare=False)
    large = Options(model="large")
    with Client(settings) as client:
        jobs = client.submit_many([REQUEST] * 5, large)
        jobs += [client.submit(REQUEST, keyed(f"k{n}", model="large")) for n in range(5)]
        jobs += [client.submit(REQUEST, large, id=f"order-{n}") for n in range(5)]
        assert fleet.records()["c"] == {job.id for job in jobs}
        left = sum(map(len, fleet.records().values()))
        with pytest.raises(UnknownModel):
            client.submit(REQUEST, Options(model="nobody"))
        with pytest.raises(UnknownModel):
            client.submit(REQUEST, keyed("x", model="nobody"))
        assert sum(map(len, fleet.records().values())) == left
    # Later another cell serves the model, too: the keys stay where their jobs are.
    own = fleet.settings().in_cell("a")
    with connect(own) as raw:
        WorkerLedger(raw, own).register("w", ("large",), "{}", ttl_s=60, spare=False)
    with Client(settings) as client:
        again = [client.submit(REQUEST, keyed(f"k{n}", model="large")) for n in range(5)]
        again += [client.submit(REQUEST, large, id=f"order-{n}") for n in range(5)]
    assert again == jobs[5:]


@pytest.mark.parametrize("first", ["old", "new"])
def test_a_key_is_one_job_for_clients_with_the_old_and_the_new_list(
    fleet: Fleet, first: str
) -> None:
    """What the new list's cell records is known to the old one's, whoever comes first."""
    lists = {"old": "1=a,b", "new": "1=a,b 2=a,b,c"}
    order = [first, *(name for name in lists if name != first), first]
    found: dict[str, list[str]] = {"key": [], "id": []}
    for name in order:
        with Client(fleet.settings(lists[name])) as client:
            jobs = [client.submit(REQUEST, keyed(f"k{n}")) for n in range(30)]
            found["key"].append(" ".join(job.id for job in jobs))
            ids = [client.submit(REQUEST, id=f"order-{n}").id for n in range(30)]
            found["id"].append(" ".join(ids))
    assert all(len(set(each)) == 1 for each in found.values())
    assert sum(map(len, fleet.records().values())) == 60


def test_a_cell_that_drained_and_came_back_doubles_no_key(fleet: Fleet) -> None:
    history = ["1=a,b", "1=a,b 2=a", "1=a,b 2=a 3=a,b"]
    clients = [Client(fleet.settings(lists)) for lists in history]
    keys = [f"k{n}" for n in range(40)]
    for at, key in enumerate(keys):  # each key first by another of the lists
        order = clients[at % 3 :] + clients[: at % 3]
        assert len({client.submit(REQUEST, keyed(key)).id for client in [*order, *order]}) == 1
    for client in clients:
        client.close()
    assert sum(map(len, fleet.records().values())) == len(keys)


def test_a_key_is_one_job_when_the_only_cell_of_its_model_drains_into_another(
    fleet: Fleet,
) -> None:
    key = keyed(key_in("ab"), model="large")
    serve(fleet, "b", "large")
    with Client(fleet.settings("1=a,b")) as client:
        job = client.submit(REQUEST, key)
    assert cell_of(job.id) == "b"
    serve(fleet, "a", "large")
    for lists in ("1=a,b 2=a", "1=a,b"):
        with Client(fleet.settings(lists)) as client:
            assert client.submit(REQUEST, key) == job
    assert sum(map(len, fleet.records().values())) == 1


def test_a_key_is_one_job_when_a_cell_of_a_higher_rank_joins(fleet: Fleet) -> None:
    key = keyed(key_in("cab"), model="large")
    serve(fleet, "b", "large")
    with Client(fleet.settings("1=a,b")) as client:
        job = client.submit(REQUEST, key)
    for cell in "ac":
        serve(fleet, cell, "large")
    with Client(fleet.settings("1=a,b 2=a,b,c")) as client:
        assert client.submit(REQUEST, key) == job
    assert sum(map(len, fleet.records().values())) == 1


@pytest.mark.parametrize(
    ("lists", "order", "first"), [("1=a 2=a,c", "ca", "a"), ("1=a,c", "ac", "")]
)
def test_a_key_is_recorded_after_the_cell_that_it_was_sent_to_came_back_without_its_model(
    fleet: Fleet, lists: str, order: str, first: str
) -> None:
    key = keyed(key_in(order), model="large")
    for cell in first:
        serve(fleet, cell, "large")
    fleet.kill("c")
    with (
        Client(fleet.settings(lists)) as client,
        pytest.raises(QueueUnavailable),
    ):
        client.submit(REQUEST, key)  # what c serves is not known
    fleet.start("c")
    serve(fleet, "a", "large")
    for _ in range(2):
        with Client(fleet.settings(lists)) as client:
            assert cell_of(client.submit(REQUEST, key).id) == "a"
    assert sum(map(len, fleet.records().values())) == 1


def test_a_note_is_kept_for_as_long_as_a_dead_letter_of_whoever_came_last(fleet: Fleet) -> None:
    key = key_in("cab")
    for expires in (60, 600, 60):
        options = keyed(key, expires_in=expires)
        with (
            Client(fleet.settings("1=a,b 2=a,b,c")) as client,
            suppress(IdempotencyConflict),  # the times of an equal job are its first one's
        ):
            client.submit(REQUEST, options)
    (name,) = fleet.keys("blipq:moved:*")["a"]
    with connect(fleet.settings().in_cell("a")) as raw:
        kept_s = raw.ttl(name)
        assert raw.ttl(keys.MOVES) > kept_s
    assert kept_s > fleet.settings().dead_letter_ttl + 400


def test_no_note_is_looked_for_where_no_list_has_changed(fleet: Fleet, client: Client) -> None:
    raws = [connect(fleet.settings().in_cell(name)) for name in "abc"]
    for raw in raws:
        raw.config_resetstat()
    client.submit_many([Submission(REQUEST, Options(), f"order-{n}") for n in range(30)])
    for raw in raws:
        stats: Any = raw.info("commandstats")
        assert "cmdstat_evalsha" in stats
        assert "cmdstat_get" not in stats
        raw.close()


def test_a_former_cell_that_is_away_is_no_reason_for_a_second_job(fleet: Fleet) -> None:
    key = next(
        f"k{n}"
        for n in range(1000)
        if ranked(f"k{n}", "ab")[0] == "b" and ranked(f"k{n}", "abc")[0] == "c"
    )
    with Client(fleet.settings("1=a,b 2=a,b,c")) as client:
        fleet.kill("b")
        with pytest.raises(QueueUnavailable):
            client.submit(REQUEST, keyed(key))
        assert sum(map(len, fleet.records().values())) == 0
        fleet.start("b")
        assert cell_of(client.submit(REQUEST, keyed(key)).id) == "c"


def test_a_client_whose_list_lacks_a_cell_says_so(fleet: Fleet) -> None:
    key = next(
        f"k{n}"
        for n in range(1000)
        if ranked(f"k{n}", "ab")[0] == "b" and ranked(f"k{n}", "abc")[0] == "c"
    )
    with Client(fleet.settings("1=a,b 2=a,b,c")) as client:
        client.submit(REQUEST, keyed(key))
    urls = {name: fleet.settings().cells[name] for name in "ab"}
    with (
        Client(fleet.settings("1=a,b", cells=urls)) as old,
        pytest.raises(QueueUnavailable, match="'c', which BLIPQ_CELLS does not name"),
    ):
        old.submit(REQUEST, keyed(key))


def test_a_cell_that_drains_takes_no_new_job_and_keeps_those_it_has(fleet: Fleet) -> None:
    with Client(fleet.settings("1=a,b,c")) as client:
        before = client.submit_many(REQUEST for _ in range(30))
    with Client(fleet.settings("1=a,b,c 2=a,c")) as client:
        after = client.submit_many(REQUEST for _ in range(30))
        assert {cell_of(job.id) for job in after} == {"a", "c"}
        assert {job.info().status for job in before} == {"queued"}
        assert client.cancel_all(JobFilter(status=Status.QUEUED)) == 60


def test_an_operator_sees_all_cells_as_one(fleet: Fleet, client: Client) -> None:
    jobs = client.submit_many(REQUEST for _ in range(30))
    operator = operator_of(client.ledger)
    assert operator.open_jobs() == 30
    (queue,) = operator.queues()
    assert (queue.queue, queue.waiting, queue.paused) == ("blipq.default.normal", 30, False)
    assert client.pause(queue.queue) == 30
    assert operator.queues()[0].paused
    found, after = [], None
    while True:
        page = operator.listing.page(Wanted(), limit=7, after=after)
        found += [info.id for info in page.jobs]
        after = page.next
        if after is None:
            break
    assert sorted(found) == sorted(job.id for job in jobs)
    assert len(found) == len(set(found))
    places = [Place(round(client.job(id).info().created_at.timestamp() * 1000), id) for id in found]
    assert places == sorted(places, reverse=True)
    assert operator.purge(queue.queue) == 30
    assert Counter(each.action for each in actions_of(client.ledger, 100)) == {
        "pause": 3,
        "purge": 3,
    }


def test_what_serves_one_cell_needs_its_name(fleet: Fleet) -> None:
    with pytest.raises(InvalidRequest, match="set BLIPQ_CELL to one of a, b, c"):
        connect(fleet.settings())
    with Client(fleet.settings(cell="b")) as client:
        assert cell_of(client.submit(REQUEST).id) == "b"
        with pytest.raises(InvalidRequest, match="unset it"):
            client.submit(REQUEST, keyed("k"))


def test_an_event_loop_has_the_same_cells(fleet: Fleet) -> None:
    async def scenario() -> None:
        async with AsyncClient(fleet.settings()) as client:
            jobs = await client.submit_many([REQUEST] * 20)
            key = key_of("b")
            job = await client.submit(REQUEST, keyed(key))
            assert cell_of(job.id) == "b"
            assert await client.submit(REQUEST, keyed(key)) == job
            await asyncio.to_thread(fleet.kill, "b")
            later = [await client.submit(REQUEST) for _ in range(10)]
            assert {cell_of(each.id) for each in later} == {"a", "c"}
            live = [each for each in jobs + later if cell_of(each.id) != "b"]
            for each in live:
                finish(fleet, each.id, str(cell_of(each.id)))
            ended = await client.wait_all(live, timeout=30)
            assert ended == live

    asyncio.run(scenario())


def test_a_list_gives_the_same_cells_to_every_process() -> None:
    """What is hashed must never change: jobs of an earlier release are found by it."""
    cells = Cells.of({"a": "redis://a", "b": "redis://b", "c": "redis://c"})
    assert [ranked(f"order-{n}", cells.current)[0] for n in range(8)] == list("accacacb")


def test_a_run_of_a_bulk_is_listed_once_whichever_cells_have_noted_it(client: Client) -> None:
    ids = [f"bulk_{number}" for number in range(9)]
    for runs in (beside_each(Runs, client.ledger) or {}).values():
        runs.note(Run(ids[0], "old.jsonl", "running", None, at=-1.0))
    for number, id in enumerate(ids):
        run = Run(id, "m.jsonl", "running", None, at=float(number))
        Runs.beside(home_of(client.ledger, id)).note(run)
    found = runs_of(client.ledger)
    assert [run.id for run in found] == ids[::-1]
    assert {run.name for run in found} == {"m.jsonl"}
