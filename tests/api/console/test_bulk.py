"""All jobs of a filtered list at once: counted, confirmed, and then exactly those."""

import asyncio
import gc
import re
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TypeVar

import httpx2
import pytest
import redis

from api.console.conftest import HOSTILE, Keyed, Markup, claimed, page
from blipq import Client, JobInfo, Settings
from blipq.contract import ErrorCode, JobError
from blipq.ledger import keys
from blipq.ledger.erasure import CHUNK as ERASED_AT_ONCE
from blipq.ledger.views.listing import Wanted
from blipq.ledger.worker import WorkerLedger
from blipq_api import turns
from blipq_api.access.selections import Selection
from blipq_api.console import bulk
from blipq_api.console.bulk import BULKS, SHOWN
from blipq_api.door import COUNTS, Door
from blipq_api.problems import Problem
from blipq_api.settings import ApiSettings

T = TypeVar("T")
PHOTO = "s3://photos/shop/cat.jpg"


def failed(client: Client, ledger: WorkerLedger, id: str) -> str:
    error = JobError(code=ErrorCode.IMAGE_NOT_FOUND, message="gone").model_dump_json()
    assert ledger.fail(claimed(ledger, id), error, "{}")
    return id


def caption(client: Client, **options: object) -> str:
    return client.caption(PHOTO, **options).id  # type: ignore[arg-type]


def statuses(client: Client, ids: list[str]) -> list[str]:
    return [str(client.job(id).info().status) for id in ids]


def with_door(settings: Settings, run: Callable[[Door], Awaitable[T]]) -> T:
    """What ``run`` does with a door in this process."""

    async def opened() -> T:
        door = Door(ApiSettings.model_validate(settings.model_dump()))
        try:
            return await run(door)
        finally:
            await door.aclose()

    return asyncio.run(opened())


def counted(
    http: httpx2.Client, action: str, code: int = 200, **filters: str
) -> tuple[int, dict[str, str]]:
    """The number of jobs that a dry run shows, and the form that changes them."""
    token = page(http, "").values("value")[0]
    answer = http.post("/console/select", data={"form_token": token, "action": action, **filters})
    assert answer.status_code == code, answer.text[:2000]
    shown = re.search(r"<h1>[^<]*: ([\d,]+) jobs?</h1>", answer.text)
    selection = Markup(answer.text).elements
    fields = {
        given["name"]: given["value"]
        for tag, given in selection
        if tag == "input" and given["name"] in ("selection", "form_token")
    }
    return (-1 if shown is None else int(shown[1].replace(",", ""))), fields


def test_exactly_the_jobs_that_were_counted_are_queued_again(
    operator: httpx2.Client, client: Client, ledger: WorkerLedger
) -> None:
    meant = [failed(client, ledger, caption(client)) for _ in range(3)]
    other_kind = failed(client, ledger, client.vqa(PHOTO, "what?").id)
    waiting = caption(client)
    count, form = counted(operator, "retry", status="failed", kind="caption")
    assert count == 3
    assert statuses(client, meant) == ["failed"] * 3, "nothing is changed by counting"
    later = failed(client, ledger, caption(client))
    gone = meant.pop()
    client.retry_all([gone])
    client.job(gone).cancel()
    answer = operator.post("/console/bulk", data=form)
    assert "<h1>3 jobs queued again</h1>" in answer.text
    assert statuses(client, [*meant, gone]) == ["queued"] * 3
    assert statuses(client, [other_kind, later, waiting]) == ["failed", "failed", "queued"]
    assert operator.post("/console/bulk", data=form).status_code == 409, "once"


def test_a_job_that_changed_since_it_was_counted_stays_as_it_is_and_the_page_says_so(
    operator: httpx2.Client, client: Client, ledger: WorkerLedger
) -> None:
    ids = [caption(client, metadata={"campaign": "spring"}) for _ in range(3)]
    caption(client)
    count, form = counted(operator, "cancel", name="campaign", value="spring")
    assert count == 3
    failed(client, ledger, ids[0])
    answer = operator.post("/console/bulk", data=form)
    assert "<h1>2 jobs cancelled</h1>" in answer.text
    assert "3 were counted" in answer.text
    assert sorted(statuses(client, ids)) == ["cancelled", "cancelled", "failed"]


def test_only_what_has_ended_is_forgotten_and_it_is_gone(
    operator: httpx2.Client, client: Client, ledger: WorkerLedger
) -> None:
    ended = [failed(client, ledger, caption(client)) for _ in range(2)]
    open_ = caption(client)
    count, form = counted(operator, "forget", kind="caption")
    assert count == 2
    assert "<h1>2 jobs erased</h1>" in operator.post("/console/bulk", data=form).text
    listed = page(operator, "jobs").text
    assert [id in listed for id in (*ended, open_)] == [False, False, True]


def test_a_job_that_was_queued_again_since_it_was_counted_is_not_forgotten(
    operator: httpx2.Client, client: Client, ledger: WorkerLedger
) -> None:
    again, gone = (failed(client, ledger, caption(client)) for _ in range(2))
    count, form = counted(operator, "forget", status="failed")
    assert count == 2
    client.retry_all([again])
    answer = operator.post("/console/bulk", data=form)
    assert "<h1>1 job erased</h1>" in answer.text
    assert "2 were counted" in answer.text
    assert statuses(client, [again]) == ["queued"]
    assert gone not in page(operator, "jobs").text


def test_a_job_that_is_queued_again_while_others_are_erased_is_not_forgotten(
    apart: Settings, client: Client, ledger: WorkerLedger
) -> None:
    indexed = client.embed(PHOTO, index={"name": "photos", "id": "cat"}).id
    ids = [indexed, *(caption(client) for _ in range(ERASED_AT_ONCE))]
    client.cancel_all(ids)
    again: list[int] = []

    def unindex(index: str, images: Sequence[str]) -> None:
        """Comes while the first chunk is erased."""
        again.append(client.retry_all([ids[0], ids[-1]]))

    async def erase(door: Door) -> tuple[int, list[str]]:
        door.__dict__["_unindex"] = unindex
        return await bulk._done(door, Selection("forget", ids, None, ""))

    assert with_door(apart, erase) == (ERASED_AT_ONCE, [])
    assert again == [1], "of the two, the one that is not being erased"
    assert statuses(client, [ids[-1]]) == ["queued"]


def test_a_count_keeps_the_records_that_it_shows_and_ids_of_the_others(
    apart: Settings, client: Client
) -> None:
    ids = [caption(client) for _ in range(2 * SHOWN)]

    def records() -> int:
        gc.collect()
        return sum(type(each) is JobInfo for each in gc.get_objects())

    async def count(door: Door) -> int:
        before = records()
        counted = await bulk._counted(door, BULKS["cancel"], Wanted())
        assert (len(counted.ids), counted.more) == (len(ids), False)
        assert [info.id for info in counted.shown] == [*counted.ids][:SHOWN]
        return records() - before

    assert with_door(apart, count) == SHOWN


def test_what_cannot_be_changed_does_not_count_towards_the_most(
    apart: Settings, client: Client, raw_redis: "redis.Redis"
) -> None:
    ids = [caption(client) for _ in range(4)]
    client.cancel_all(ids)
    for id in ids[2:]:  # as of messages that could not be run: newer ones come first
        raw_redis.hdel(keys.job(id), "contract")

    async def count(door: Door) -> list[str]:
        two = replace(BULKS["retry"], most=2)
        return [*(await bulk._counted(door, two, Wanted())).ids]

    assert sorted(with_door(apart, count)) == sorted(ids[:2])


def test_counts_are_so_many_at_a_time_and_others_wait_for_a_turn(
    apart: Settings, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "TURN_TIMEOUT_S", 0.1)

    async def count(door: Door) -> None:
        async with AsyncExitStack() as held:
            for _ in range(COUNTS):
                await held.enter_async_context(door.count())
            with pytest.raises(Problem, match="busy"):
                await bulk._counted(door, BULKS["cancel"], Wanted())
        assert not (await bulk._counted(door, BULKS["cancel"], Wanted())).ids

    with_door(apart, count)


def test_one_line_of_the_log_names_who_did_it_to_how_many_and_no_value_of_metadata(
    keyed: Keyed, operator: httpx2.Client, client: Client
) -> None:
    for _ in range(250):  # more than a script takes at once
        caption(client, metadata={"user": "42-secret"})
    count, form = counted(operator, "cancel", name="user", value="42-secret")
    assert count == 250
    operator.post("/console/bulk", data=form)
    with keyed.door.http(keyed.keys["operator"]) as api:
        actions = api.get("/v1/actions").json()["actions"]
    (line,) = [each for each in actions if each["action"] == "cancel"]
    assert (line["name"], line["via"], line["count"]) == ("operator", "api", 250)
    assert "user" in line["target"]
    assert "secret" not in line["target"]


def test_a_reading_key_is_offered_nothing_and_can_count_nothing(
    keyed: Keyed, client: Client
) -> None:
    with keyed.door.http(keyed.keys["shop"]) as api:
        id = api.post("/v1/jobs", json={"kind": "caption", "image": PHOTO}).json()["id"]
    with keyed.signed_in("shop") as http:
        assert 'action="select"' in page(http, "jobs?status=queued").text
    with keyed.signed_in("reader") as http:
        shown = page(http, "jobs?status=queued").text
        assert id in shown
        assert 'action="select"' not in shown
        for action in ("cancel", "retry", "forget"):
            assert counted(http, action, 403, status="queued")[0] == -1
        token = page(http, "").values("value")[0]
        form = {"form_token": token, "selection": "x"}
        assert http.post("/console/bulk", data=form).status_code == 409
    assert statuses(client, [id]) == ["queued"]


def test_another_tenants_jobs_are_not_counted_and_another_sessions_not_changed(
    keyed: Keyed, client: Client
) -> None:
    ids = {}
    for name in ("shop", "other"):
        with keyed.door.http(keyed.keys[name]) as api:
            body = {"kind": "caption", "image": PHOTO}
            ids[name] = api.post("/v1/jobs", json=body).json()["id"]
    with keyed.signed_in("other") as http, keyed.signed_in("operator") as admin:
        count, form = counted(http, "cancel", kind="caption")
        assert count == 1
        own = page(admin, "").values("value")[0]
        stolen = admin.post("/console/bulk", data={**form, "form_token": own})
        assert stolen.status_code == 409
        assert statuses(client, [*ids.values()]) == ["queued", "queued"]
        assert http.post("/console/bulk", data=form).status_code == 200
        assert counted(admin, "cancel", kind="caption")[0] == 1
    assert statuses(client, [*ids.values()]) == ["queued", "cancelled"]


@pytest.mark.parametrize("path", ["select", "bulk"])
def test_a_form_of_another_site_or_session_counts_and_changes_nothing(
    keyed: Keyed, client: Client, path: str
) -> None:
    id = caption(client)
    with keyed.signed_in() as http, keyed.signed_in() as another:
        _, form = counted(http, "cancel", kind="caption")
        data = {**form, "action": "cancel", "kind": "caption"}
        foreign = page(another, "").values("value")[0]
        for token in ("", foreign):
            answer = http.post(f"/console/{path}", data={**data, "form_token": token})
            assert (answer.status_code, "stale_form" in answer.text) == (403, True)
        for headers in ({"Sec-Fetch-Site": "cross-site"}, {"Origin": "https://evil.example"}):
            assert http.post(f"/console/{path}", data=data, headers=headers).status_code == 403
        assert statuses(client, [id]) == ["queued"]
        assert http.post("/console/bulk", data=form).status_code == 200, "it still stands"


def test_a_list_without_a_filter_and_what_is_no_action_are_refused(
    operator: httpx2.Client, client: Client
) -> None:
    caption(client)
    assert 'action="select"' not in page(operator, "jobs").text
    for action, filters in (("cancel", {}), ("drop", {"kind": "caption"})):
        assert counted(operator, action, 422, **filters)[0] == -1
    assert counted(operator, "cancel", 422, status="nonsense")[0] == -1
    assert counted(operator, "retry", status="succeeded")[0] == 0


def test_a_session_keeps_one_selection_for_ten_minutes(
    operator: httpx2.Client, client: Client, raw_redis: "redis.Redis"
) -> None:
    caption(client)
    _, first = counted(operator, "cancel", kind="caption")
    _, second = counted(operator, "cancel", kind="caption")
    (name,) = raw_redis.scan_iter("blipq:selection:*")
    assert 590 < int(raw_redis.ttl(name)) <= 600  # type: ignore[arg-type]
    assert operator.post("/console/bulk", data=first).status_code == 409
    assert operator.post("/console/bulk", data=second).status_code == 200
    assert not [*raw_redis.scan_iter("blipq:selection:*")]


def test_hostile_texts_in_filters_and_jobs_are_no_markup(
    operator: httpx2.Client, client: Client, hostile: list[str]
) -> None:
    token = page(operator, "").values("value")[0]
    form = {"form_token": token, "action": "retry", "name": HOSTILE[:64], "value": HOSTILE}
    answer = operator.post("/console/select", data=form)
    assert answer.status_code == 200
    assert hostile[5] in answer.text
    assert "<img src=x" not in answer.text
    assert "<svg onload" not in answer.text


def test_an_error_that_answers_a_form_does_not_become_the_address_of_the_page(
    operator: httpx2.Client,
) -> None:
    """Loaded again, the address would be a 405: it takes forms alone."""
    by_htmx = {"HX-Request": "true"}
    for path in ("select", "bulk", "job", "queues", "webhooks"):
        answer = operator.post(f"/console/{path}", data={"action": "cancel"}, headers=by_htmx)
        assert (answer.status_code, answer.headers["hx-push-url"]) == (403, "false")
    assert "hx-push-url" not in operator.get("/console/job?id=unknown", headers=by_htmx).headers
