"""What pages show: without scripts, as any HTTP client gets them."""

import io
import json
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from urllib.parse import urljoin, urlsplit

import httpx2
import pytest
from PIL import Image

from api.conftest import Start
from api.console.conftest import (
    HOSTILE,
    HX,
    PAGES,
    TEMPLATES,
    Keyed,
    Markup,
    explained,
    page,
    succeed,
)
from blipq import Client, ImageRef, Settings
from blipq.images.heat import PALETTE
from blipq.ledger.views.runs import Run, Runs
from blipq.ledger.worker import WorkerLedger
from blipq.s3.storage import Storage
from blipq_api.access.keys import LOCAL
from blipq_api.access.sessions import Session
from blipq_api.console.pages import HEADERS, _environment, seconds
from blipq_api.console.pictures import MOST_BYTES, type_of
from blipq_api.console.rates import rate_of
from blipq_api.console.routes import PAGES as ROUTES
from conftest import ROOT

SCENE = (ROOT / "docs" / "scene.png").read_bytes()


def addresses(ids: list[str]) -> Iterator[str]:
    """The pages of jobs beside those that list."""
    yield from (*PAGES, "login", f"jobs?name={HOSTILE}&value={HOSTILE}", f"try?text={HOSTILE}")
    yield from (f"job?id={id}" for id in ids)
    yield f"webhooks?replayed={HOSTILE}"


def every_page(http: httpx2.Client, ids: list[str]) -> Iterator[Markup]:
    for address in addresses(ids):
        path, _, query = address.partition("?")
        pairs = [pair.partition("=")[::2] for pair in query.split("&")] if query else []
        answer = http.get(f"/console/{path}", params=httpx2.QueryParams(pairs))
        if answer.status_code != 303:
            assert answer.status_code == 200, answer.text[:2000]
            yield Markup(answer.text)
    yield Markup(http.get("/console/job", params={"id": HOSTILE}).text)


def test_hostile_texts_are_no_markup_on_any_page(
    operator: httpx2.Client, hostile: list[str]
) -> None:
    attributes = [pair for text in TEMPLATES.values() for pair in HX.findall(text)]
    written = {(name, value[1:-1]) for name, value in attributes}
    shown = [*every_page(operator, hostile)]
    assert len(shown) > 15
    assert sum("hx-get" in each.text for each in shown) > 5
    assert sum("onerror=hit()" in each.text for each in shown) > 10
    for each in shown:
        assert "<img src=x" not in each.text
        assert "<svg onload" not in each.text
        # What a reader wrote stays as it is in its field.
        assert "\u202e" not in re.sub(r"<input[^>]*>", "", each.text)
        tags = {tag for tag, _ in each.elements}
        assert tags.isdisjoint({"iframe", "object", "embed", "base", "style"})
        for tag, given in each.elements:
            assert tag != "script" or given["src"].startswith("static/")
            assert not [name for name in given if name.startswith("on") or name == "style"]
            found = {pair for pair in given.items() if pair[0].startswith(("hx-", "data-hx-"))}
            assert found <= written, "what htmx does is said by templates alone"


def test_what_can_have_the_focus_in_a_renewed_part_has_an_id(
    operator: httpx2.Client, hostile: list[str]
) -> None:
    """htmx gives the focus to what has the same id: without one it would be lost at each copy."""
    renewed = [each for each in every_page(operator, hostile) if 'id="fresh"' in each.text]
    assert len(renewed) > 6
    for each in renewed:
        live = Markup(each.text.partition('id="live"')[2].partition("</main>")[0])
        for tag, given in live.elements:
            if tag in ("a", "button", "summary") or "tabindex" in given:
                assert given.get("id"), (tag, given)
        ids = each.values("id")
        assert len(ids) == len({*ids})
        assert not [id for id in ids if not re.fullmatch(r"[a-z0-9-]+", id)]


def test_a_renewal_or_a_form_after_the_end_of_the_session_leads_to_where_to_sign_in(
    keyed: Keyed,
) -> None:
    with keyed.door.http() as http:
        by_htmx = {"HX-Request": "true", "Sec-Fetch-Dest": "empty"}
        for path, to in (("queues", "login?next=queues"), ("job?id=a", "login?next=job%3Fid%3Da")):
            answer = http.get(f"/console/{path}", headers=by_htmx)
            assert (answer.status_code, answer.headers["hx-redirect"]) == (401, to)
        answer = http.post("/console/queues", headers=by_htmx, data={"action": "pause"})
        assert (answer.status_code, answer.headers["hx-redirect"]) == (401, "login")
        answer = http.get("/console/queues", headers={"Sec-Fetch-Dest": "empty"})
        assert (answer.status_code, "hx-redirect" in answer.headers) == (401, False)


def test_no_page_names_another_place_or_where_the_door_lies(
    operator: httpx2.Client, hostile: list[str]
) -> None:
    for each in every_page(operator, hostile):
        for link in each.values("href", "src", "action", "data-stages"):
            found = urlsplit(link)
            assert (found.scheme, found.netloc) == ("", ""), link
            assert not found.path.startswith("/"), link


def test_pages_let_nothing_run_but_their_own_files(operator: httpx2.Client) -> None:
    for path in (*PAGES, "job?id=unknown"):
        sent = operator.get(f"/console/{path}").headers
        assert sent["content-security-policy"] == HEADERS["Content-Security-Policy"]
        assert "unsafe" not in sent["content-security-policy"]
        assert sent["x-content-type-options"] == "nosniff"
        assert sent["cache-control"] == "no-store"
    names = {
        link for link in page(operator, "").values("src", "href") if link.startswith("static/")
    }
    assert len(names) == 6
    for name in names:
        file = operator.get(f"/console/{name}")
        assert (file.status_code, "immutable" in file.headers["cache-control"]) == (200, True)


def test_jobs_are_filtered_and_paged(operator: httpx2.Client, client: Client) -> None:
    cats = [client.caption("s3://photos/cat.jpg", metadata={"of": "cat"}).id for _ in range(3)]
    others = [client.vqa("s3://photos/dog.jpg", "what?", model="m").id for _ in range(60)]
    first = page(operator, "jobs")
    older = next(link for link in first.values("href") if "cursor=" in link)
    second = page(operator, older)
    assert not [id for id in others if (id in first.text) == (id in second.text)]
    assert [id for id in cats if id in second.text] == cats
    for query in (
        "kind=caption",
        "name=of&value=cat",
        "model=default",
        "status=queued&kind=caption",
    ):
        found = page(operator, f"jobs?{query}").text
        assert [id for id in (*cats, *others) if id in found] == cats
    assert "No job is like that" in page(operator, "jobs?status=failed").text
    wrong = page(operator, "jobs?status=nonsense", 422)
    assert "status: one of" in wrong.text


def test_a_jobs_page_has_its_answers_times_and_calls(
    operator: httpx2.Client, client: Client, ledger: WorkerLedger
) -> None:
    job = client.vqa("s3://photos/it's.jpg", "what's in it?", metadata={"order": "17"}, model="m")
    waiting = page(operator, f"job?id={job.id}").text
    assert "no live worker serves the model" in waiting
    assert "BLIPQ_MODELS=m=CHECKPOINT blipq worker" in waiting
    answer = {"question": "what's in it?", "text": "a cat"}
    succeed(ledger, job.id, {"kind": "vqa", "answers": [answer]})
    shown = page(operator, f"job?id={job.id}")
    for text in ("a cat", "17", "in the queue", "3 ms", "first taken by a worker"):
        assert text in shown.text
    curl, python = (
        operator.get(f"/console/job?id={job.id}").text.split("<code>")[at].split("</code>")[0]
        for at in (1, 2)
    )
    assert "/v1/jobs?wait=30" in curl
    assert "it&#39;&#34;&#39;&#34;&#39;s.jpg" in curl  # as a shell takes a quote
    assert "image=&#34;s3://photos/it&#39;s.jpg&#34;" in python
    assert "model=&#39;m&#39;" in python


def test_dead_letters_are_tried_again_and_jobs_forgotten(
    operator: httpx2.Client, client: Client, ledger: WorkerLedger, hostile: list[str]
) -> None:
    shown = page(operator, "dead")
    form = shown.fields("retry")
    assert operator.post("/console/job", data=form).headers["location"] == "dead"
    assert client.job(form["id"]).info().status == "queued"
    assert "There is none" in page(operator, "dead").text
    form = page(operator, f"job?id={hostile[1]}").fields("forget")
    assert operator.post("/console/job", data=form).headers["location"] == "jobs"
    gone = page(operator, f"job?id={hostile[1]}", 404)
    assert "Look for the job in the list" in gone.text


def test_a_cancelled_job_is_tried_again(operator: httpx2.Client, client: Client) -> None:
    job = client.caption("s3://photos/cat.jpg")
    job.cancel()
    form = page(operator, f"job?id={job.id}").fields("retry")
    assert operator.post("/console/job", data=form).status_code == 303
    assert job.status() == "queued"
    assert page(operator, f"job?id={job.id}").text.count('value="retry"') == 0, "it waits"


def test_a_queue_is_paused_and_resumed_and_the_log_says_by_whom(
    operator: httpx2.Client, client: Client, ledger: WorkerLedger
) -> None:
    job = client.caption("s3://photos/cat.jpg")
    assert "Nothing is in the log" in page(operator, "log").text
    form = page(operator, "queues").fields("pause")
    assert form["queue"] == "blipq.default.normal"
    assert operator.post("/console/queues", data=form).headers["location"] == "queues"
    assert ledger.claim(job.id, "w1") == "paused"
    assert ">paused" in page(operator, "").text, "the overview says so, too"
    form = page(operator, "queues").fields("resume")
    assert operator.post("/console/queues", data=form).headers["location"] == "queues"
    assert not isinstance(ledger.claim(job.id, "w1"), str)
    log = page(operator, "log").text
    for text in ("operator", "pause", "resume", "blipq.default.normal"):
        assert text in log
    assert "Older" not in log
    for wrong, field in (({"queue": "blipq"}, "queue"), ({"action": "drop"}, "action")):
        answer = operator.post("/console/queues", data={**form, **wrong})
        assert (answer.status_code, f"{field}:" in answer.text) == (422, True)


def test_the_log_has_pages(operator: httpx2.Client, client: Client) -> None:
    for _ in range(51):
        client.caption("s3://photos/cat.jpg").cancel()
    first = page(operator, "log")
    (older,) = (each for each in first.values("href") if each.startswith("log?"))
    assert first.text.count("<time") == 50
    assert page(operator, older).text.count("<time") == 1
    assert page(operator, "log?cursor=nonsense", 422)


def test_only_who_may_operate_pauses_queues_and_reads_the_log(
    keyed: Keyed, client: Client, ledger: WorkerLedger
) -> None:
    job = client.caption("s3://photos/cat.jpg")
    with keyed.signed_in("reader") as http:
        shown = page(http, "queues")
        assert 'value="pause"' not in shown.text
        token = next(g["value"] for _, g in shown.elements if g.get("name") == "form_token")
        form = {"form_token": token, "queue": "blipq.default.normal", "action": "pause"}
        assert http.post("/console/queues", data=form).status_code == 403
        assert page(http, "log", 403)
    with keyed.signed_in() as http:
        assert http.post("/console/queues", data=form).status_code == 403, "another session's form"
    assert not isinstance(ledger.claim(job.id, "w1"), str)


def test_webhooks_are_listed_and_sent_again(operator: httpx2.Client, hostile: list[str]) -> None:
    waiting = page(operator, "webhooks?dead=false")
    assert f"{hostile[0]}" in waiting.text
    form = {
        given["name"]: given["value"]
        for tag, given in waiting.elements
        if tag == "input" and given["name"] in ("event", "form_token")
    }
    answer = operator.post("/console/webhooks", data=form)
    assert answer.status_code == 303
    assert "is sent again" in page(operator, answer.headers["location"]).text
    unknown = operator.post("/console/webhooks", data={**form, "event": "nothing/job.failed"})
    assert (unknown.status_code, "Look for the event" in unknown.text) == (404, True)


@pytest.fixture
def storage(apart: Settings) -> Storage:
    storage = Storage(apart)
    storage.create_bucket("photos")
    return storage


def test_a_picture_is_sent_as_what_its_bytes_are_and_nothing_else_is(
    operator: httpx2.Client, client: Client, storage: Storage
) -> None:
    def shown(name: str, data: bytes) -> httpx2.Response:
        storage.put(f"s3://photos/{name}", data, content_type="text/html")
        job = client.caption(f"s3://photos/{name}")
        return operator.get(f"/console/picture?id={job.id}")

    picture = shown("scene.html", SCENE)
    assert (picture.status_code, picture.content) == (200, SCENE)
    assert picture.headers["content-type"] == "image/png"
    assert picture.headers["x-content-type-options"] == "nosniff"
    assert "sandbox" in picture.headers["content-security-policy"]
    for data in (
        b"<script>hit()</script>",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"GIF8",
        b"",
    ):
        assert shown("cat.png", data).status_code == 415
    assert shown("large.png", SCENE[:8] + bytes(MOST_BYTES)).status_code == 413
    gone = client.caption("s3://photos/gone.png")
    assert operator.get(f"/console/picture?id={gone.id}").status_code == 422
    elsewhere = client.caption("https://example.org/cat.png")
    assert operator.get(f"/console/picture?id={elsewhere.id}").status_code == 404


def test_a_picture_that_is_a_part_of_an_object_is_cut_out_of_it(
    operator: httpx2.Client, client: Client, storage: Storage
) -> None:
    uri = "s3://photos/00012.tar"
    storage.put(uri, bytes(512) + SCENE + bytes(512), content_type="application/x-tar")
    found = storage.head("photos", "00012.tar")
    assert found is not None
    part = ImageRef(uri=uri, etag=found["ETag"], offset=512, length=len(SCENE))
    job = client.caption(part)
    shown = operator.get(f"/console/picture?id={job.id}")
    assert (shown.status_code, shown.content) == (200, SCENE)
    assert shown.headers["content-type"] == "image/png"
    page = operator.get(f"/console/job?id={job.id}").text
    assert f"bytes 512 to {512 + len(SCENE) - 1:,}" in page
    # A part of other bytes is no picture of this job.
    storage.put(uri, bytes(512) + SCENE[:-1] + bytes(513), content_type="application/x-tar")
    assert operator.get(f"/console/picture?id={job.id}").status_code == 422


@pytest.mark.parametrize(
    "image",
    [
        {"uri": "s3://photos/a.tar", "etag": "1", "offset": 512},
        {"uri": "s3://photos/a.tar", "etag": "1", "offset": "here", "length": [1]},
        {"uri": 7, "offset": 0, "length": 1},
        {"offset": 0, "length": 1},
        [],
    ],
)
def test_a_jobs_page_is_shown_whatever_another_client_wrote_as_its_picture(
    operator: httpx2.Client, client: Client, ledger: WorkerLedger, image: object
) -> None:
    job = client.caption("s3://photos/cat.png")
    request = json.dumps({"kind": "caption", "image": image})
    ledger.redis.hset(f"blipq:job:{job.id}", "request", request)
    page = operator.get(f"/console/job?id={job.id}")
    assert (page.status_code, "bytes 512 to" in page.text) == (200, False)
    assert operator.get(f"/console/picture?id={job.id}").status_code == 404


def test_a_picture_needs_the_right_to_read_it(keyed: Keyed, storage: Storage) -> None:
    storage.put("s3://photos/shop/cat.png", SCENE, content_type="image/png")
    with keyed.door.http(keyed.keys["shop"]) as api:
        body = {"kind": "caption", "image": "s3://photos/shop/cat.png"}
        id = api.post("/v1/jobs", json=body).json()["id"]
    with keyed.signed_in("shop") as http:
        assert http.get(f"/console/picture?id={id}").content == SCENE
    with keyed.signed_in("reader") as http:  # of the same tenant, with no bucket
        assert http.get(f"/console/job?id={id}").status_code == 200
        assert http.get(f"/console/picture?id={id}").status_code == 403


def test_bulks_are_listed_to_who_may_see_them(
    keyed: Keyed, operator: httpx2.Client, client: Client
) -> None:
    runs = Runs.beside(client.ledger)
    counts = {"succeeded": 5, "failed": 1}
    for tenant in ("shop", "zoo"):
        noted = Run(f"bulk_{tenant}", f"{tenant} {HOSTILE}", "running", tenant, time.time(), counts)
        runs.note(replace(noted, share=0.5, per_s=2.5, left_s=60.0, in_flight=7))
    runs.note(Run("bulk_old", "old.csv", "paused", None, time.time() - 3600))
    text = operator.get("/console/runs").text
    assert "<svg onload" not in text
    assert re.search(r"shop &lt;.*zoo|zoo &lt;.*shop", text, re.DOTALL)
    assert "1 without an answer" in text
    assert "in 1 min<" in text
    assert re.search(r"old\.csv.*stopped", text, re.DOTALL)
    with keyed.signed_in("reader") as http:
        text = http.get("/console/runs").text
    assert ("shop" in text, "zoo" in text, "old.csv" in text) == (True, False, False)


def test_a_heat_map_is_laid_over_the_picture_of_its_job(
    operator: httpx2.Client, client: Client, ledger: WorkerLedger
) -> None:
    job = client.match("s3://photos/cat.jpg", ["a dog", "a red cat"], explain=True)
    scores = [{"text": "a dog", "score": 0.1}, explained("a red cat", "a", "red", "cat")]
    succeed(ledger, job.id, {"kind": "match", "head": "itm", "scores": scores})
    shown = page(operator, f"job?id={job.id}")
    maps = [link for link in shown.values("src") if link.startswith("heat?")]
    assert [link.partition("&")[2] for link in maps] == [f"text=1&word={n}" for n in range(4)]
    for link in maps:
        answer = operator.get(f"/console/{link}")
        assert answer.headers["content-type"] == "image/png"
        assert "sandbox" in answer.headers["content-security-policy"]
        with Image.open(io.BytesIO(answer.content)) as drawn:
            assert drawn.size == (3, 2)
            row = [drawn.convert("RGBA").getpixel((column, 0)) for column in range(3)]
        assert row == [(*PALETTE[3 * level : 3 * level + 3], 166) for level in (0, 128, 255)]
    for query in ("text=0&word=0", "text=2&word=0", "text=1&word=4", "text=1", "word=0", "text=-1"):
        assert operator.get(f"/console/heat?id={job.id}&{query}").status_code == 404, query


def test_a_heat_map_is_shown_to_whom_the_job_is(
    keyed: Keyed, client: Client, ledger: WorkerLedger
) -> None:
    job = client.match("s3://photos/cat.jpg", "a cat", explain=True)
    scores = [explained("a cat")]
    succeed(ledger, job.id, {"kind": "match", "head": "itm", "scores": scores})
    address = f"/console/heat?id={job.id}&text=0&word=0"
    with keyed.signed_in("operator") as http:
        assert http.get(address).status_code == 200
    with keyed.signed_in("other") as http:
        assert http.get(address).status_code == 404
    with keyed.door.http() as http:
        assert http.get(address).status_code in (303, 401)


def test_what_cannot_be_submitted_is_said_in_the_form_that_keeps_what_was_written(
    operator: httpx2.Client, client: Client
) -> None:
    token = page(operator, "try").values("value")[0]

    def sent(fields: dict[str, str], data: bytes = b"") -> httpx2.Response:
        files = {"file": ("cat.png", data, "image/png")}
        return operator.post("/console/try", data={"form_token": token, **fields}, files=files)

    nothing = sent({"kind": "vqa", "questions": "one?\ntwo?", "model": "default"})
    assert (nothing.status_code, "drop a picture" in nothing.text) == (422, True)
    assert "one?\ntwo?" in nothing.text
    unknown = sent({"kind": "caption", "model": "unknown"}, SCENE)
    assert (unknown.status_code, "no worker has served" in unknown.text) == (422, True)
    assert 'value="s3://blipq-inbox/operator/' in unknown.text
    assert sent({"kind": "caption", "form_token": "wrong"}, SCENE).status_code == 403
    answer = sent({"kind": "vqa", "questions": "one?\ntwo?", "model": "m"}, SCENE)
    assert answer.status_code == 303, answer.text
    info = client.job(answer.headers["location"].partition("id=")[2]).info()
    assert (info.tenant, info.model, info.kind) == ("operator", "m", "vqa")
    picture = operator.get(f"/console/picture?id={info.id}")
    assert picture.content == SCENE


def test_when_redis_is_away_the_page_says_what_to_do(start: Start) -> None:
    door = start(redis_url="redis://127.0.0.1:1/0", timeout_s="0.5")
    with door.http() as http:
        answer = http.get("/console/")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert "blipq doctor" in answer.text
        assert "Try again" in answer.text


@pytest.mark.parametrize("path", [each.path for each in ROUTES if each.method == "POST"])
def test_an_error_of_a_form_leads_to_a_page_that_is_there(
    operator: httpx2.Client, path: str
) -> None:
    answer = operator.post(path, data={"form_token": "wrong", "key": "blipq_wrong"})
    assert answer.status_code in (401, 403, 415)
    links = re.findall(r'<a class="button" href="([^"]*)"', answer.text)
    for link in links:
        assert operator.get(urljoin(path, link)).status_code in (200, 303)
    assert links or path.endswith("login")


def test_a_form_of_a_tenant_at_its_limit_says_what_to_do(
    operator: httpx2.Client, client: Client
) -> None:
    job = client.caption("s3://photos/cat.jpg", tenant="shop")
    job.cancel()
    form = page(operator, f"job?id={job.id}").fields("retry")
    client.limit("shop", open_jobs=0)
    answer = operator.post("/console/job", data=form)
    assert (answer.status_code, "blipq queue limit" in answer.text) == (429, True)


def test_what_can_be_done_with_a_list_is_offered_where_its_first_page_is_empty() -> None:
    """Of jobs with a pair of metadata a page may have none, and others may follow."""
    filters = {"status": "failed", "kind": "", "model": "", "name": "user", "value": "42"}
    shown = (
        _environment()
        .get_template("jobs.html")
        .render(
            session=Session(LOCAL, "secret"),
            scopes=LOCAL.scopes,
            signs_in=False,
            version="0",
            filters=filters,
            filtered=True,
            bulk={"retry": "Try again"},
            next={**filters, "cursor": "c"},
            jobs=[],
            error=None,
            first=True,
            statuses=[],
            kinds=[],
        )
    )
    assert Markup(shown).fields("retry")["value"] == "42"


def test_the_rate_is_that_of_the_time_in_which_all_ends_are_known() -> None:
    few = rate_of(1000.0, [999.0, 995.0, 500.0])
    assert (few.window_s, sum(few.values)) == (600.0, pytest.approx(3 / 10))
    assert few.mean == pytest.approx(2 / 60)
    many = rate_of(1000.0, [1000.0 - 0.02 * place for place in range(1000)])
    assert many.window_s == pytest.approx(19.98)
    assert many.mean == pytest.approx(50, rel=0.05)
    assert rate_of(1000.0, []).empty
    assert few.steps[0] == (600.0, 0.0)
    assert few.steps[-1] == (10.0, few.values[-1])
    assert len(many.values) == 60


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0421, "42 ms"), (3.14, "3.1 s"), (59.6, "60 s"), (3725, "1 h 2 min"), (90000, "1 d 1 h")],
)
def test_durations_are_short_to_read(value: float, text: str) -> None:
    assert seconds(value) == text


def test_formats_that_may_run_scripts_are_no_pictures() -> None:
    assert type_of(b"RIFF\x00\x00\x00\x00WEBPVP8 ") == "image/webp"
    assert type_of(b"\x00\x00\x00\x1cftypavif") == "image/avif"
    for data in (b"<svg", b"%PDF-1.7", b"RIFF\x00\x00\x00\x00WAVE", b"\x89PNG"):
        assert type_of(data) is None


def test_the_values_of_the_chart_stand_in_the_page(
    operator: httpx2.Client, client: Client, ledger: WorkerLedger
) -> None:
    assert "None ended" in page(operator, "").text
    job = client.caption("s3://photos/cat.jpg")
    succeed(ledger, job.id, {"kind": "caption", "captions": [{"text": "a cat"}]})
    shown = page(operator, "")
    numbers = [float(given["value"]) for tag, given in shown.elements if tag == "data"]
    assert numbers[0::2] == [-600.0 + 10 * place for place in range(60)]
    assert sum(numbers[1::2]) == pytest.approx(0.1)
    assert "10 min ago" in shown.text


def test_a_jobs_page_says_how_sure_its_texts_are(
    operator: httpx2.Client, client: Client, ledger: WorkerLedger
) -> None:
    job = client.caption("s3://photos/cat.jpg")
    sure = {"text": "a cat", "mean_token_probability": 0.913, "tokens": 3, "finish_reason": "stop"}
    loop = {"text": "a dog", "mean_token_probability": 0.4, "uncertain": True}
    loop |= {"finish_reason": "loop"}
    succeed(ledger, job.id, {"kind": "caption", "captions": [sure, loop]})
    shown = " ".join(page(operator, f"job?id={job.id}").text.split())
    assert re.search(r"a cat <span [^>]*>sure 91", shown)
    assert re.search(r"a dog <span [^>]*>unsure 40[^<]*, a loop was cut off<", shown)
