"""The console in a real browser: what runs, what it sends, and how it is to be used."""

import http.client
import json
import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis
from playwright.sync_api import Browser, BrowserContext, Page, Request, Route, sync_playwright

from api.conftest import DoorProcess, running, service_of
from api.console.browsers import chromium
from api.console.conftest import PAGES, Keyed, claimed, explained, succeed
from blipq import Client, Settings
from blipq.contract import ErrorCode, JobError
from blipq.ledger import keys
from blipq.ledger.worker import WorkerLedger
from blipq.local.stack import LocalStack
from conftest import ROOT, wait_until

pytestmark = pytest.mark.programs

SCENE = ROOT / "docs" / "scene.png"
PHONE = {"width": 390, "height": 844}
TIMEOUT_MS = 20_000
AXE = (resources.files("axe_playwright_python") / "axe.min.js").read_text()
LOADED = "[...document.images].every((each) => each.naturalWidth > 0)"
TOTAL = (
    "[...document.querySelectorAll('#values td data')]"
    ".reduce((sum, each) => sum + Number(each.value), 0)"
)
#: The next renewal is done, and htmx has scrolled to where it would.
RENEWED = """new Promise((done) => document.addEventListener(
    "htmx:afterSettle", () => setTimeout(done), {once: true}
))"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium())
        yield browser
        browser.close()


class Reader:
    """A page that fails the test for whatever runs, is refused or is loaded from elsewhere."""

    def __init__(self, context: BrowserContext, url: str) -> None:
        context.set_default_timeout(TIMEOUT_MS)
        self.url = url
        self.page: Page = context.new_page()
        self.sent: list[str] = []
        self.wrong: list[str] = []
        self.page.add_init_script("window.hit = () => console.error('hit')")
        self.page.add_init_script(
            "document.addEventListener('securitypolicyviolation', (event) =>"
            " console.error(event.violatedDirective, event.blockedURI, event.sample))"
        )
        self.page.on("request", lambda request: self.sent.append(request.url))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("dialog", lambda dialog: self.wrong.append(dialog.message))
        self.page.on("console", self._heard)

    def _heard(self, message: Any) -> None:
        refused = (
            "the server responded with a status",
            "Response Status Error Code",
            "net::ERR_FAILED",  # and what htmx says of it, and of what it ends itself
            "htmx:afterRequest",
            "htmx:sendError",
            "htmx:sendAbort",
        )
        if message.type == "error" and not any(each in message.text for each in refused):
            self.wrong.append(message.text)

    def sign_in(self, key: str) -> None:
        self.page.goto(f"{self.url}/")
        self.page.fill("#key", key)
        self.page.click("text=Sign in >> nth=-1")
        self.page.wait_for_selector("nav")

    def open(self, path: str) -> Page:
        self.page.goto(f"{self.url}/console/{path}")
        return self.page

    def check(self) -> None:
        """Fails for what must not have happened."""
        assert self.wrong == []
        places = {f"{each.scheme}://{each.netloc}" for each in map(urlsplit, self.sent)}
        assert places == {re.sub(r"(://[^/]+).*", r"\1", self.url)}


def faults_of(page: Page) -> list[tuple[str, list[str]]]:
    """What is a serious fault for people who cannot see or point, and where."""
    page.evaluate(AXE)
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    return [
        (each["id"], [node["html"][:200] for node in each["nodes"]][:3])
        for each in found
        if each["impact"] in ("serious", "critical")
    ]


def end_one(client: Client, ledger: WorkerLedger) -> None:
    """Has a job that has ended."""
    job = client.caption("s3://photos/cat.jpg")
    succeed(ledger, job.id, {"kind": "caption", "captions": [{"text": "a cat"}]})


@pytest.fixture(params=["light", "dark"])
def scheme(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def reader(browser: Browser, keyed: Keyed) -> Iterator[Reader]:
    context = browser.new_context()
    reader = Reader(context, keyed.url)
    reader.sign_in(keyed.keys["operator"])
    yield reader
    reader.check()
    context.close()


def test_hostile_texts_run_nothing_and_load_nothing(reader: Reader, hostile: list[str]) -> None:
    for path in (*PAGES, *(f"job?id={id}" for id in hostile)):
        page = reader.open(path)
        page.wait_for_load_state("networkidle")
        assert page.locator("main h1").count() == 1
        config = page.evaluate("[htmx.config.allowEval, htmx.config.allowScriptTags]")
        assert config == [False, False], "htmx runs, and runs nothing"


def test_a_picture_is_dropped_and_its_stages_and_answer_appear(
    reader: Reader, client: Client, ledger: WorkerLedger
) -> None:
    page = reader.open("try")
    page.set_input_files("#file", SCENE)
    page.wait_for_selector("canvas:visible")
    page.check("input[value=vqa]")
    page.fill("textarea[name=questions]", "what's in it?")
    page.fill("input[name=model]", "m")
    page.click("text=Submit")
    page.wait_for_selector("img[data-picture]")
    assert page.evaluate("document.querySelector('img[data-picture]').naturalWidth") > 0
    assert page.locator(".status").inner_text() == "queued"
    id = page.locator("h1.id").inner_text()
    page.evaluate("window.same = true")
    answer = {"question": "what's in it?", "text": "a red circle"}
    succeed(ledger, id, {"kind": "vqa", "answers": [answer]})
    page.wait_for_selector(".status.succeeded")
    assert page.locator(".asked dd").inner_text() == "a red circle"
    assert page.evaluate("window.same")  # it was not loaded again
    assert "what" in page.locator(".snippet pre").nth(1).inner_text()
    assert client.job(id).info().tenant == "operator"


@pytest.fixture
def served(
    stack: LocalStack, settings: Settings, worker: object, tmp_path: Path
) -> Iterator[DoorProcess]:
    """A door without keys beside a real worker with the demo model."""
    service = service_of(stack, settings, tmp_path / "door.log")
    yield running(service)
    service.stop(timeout=30)


def test_the_demo_model_answers_about_a_picture_that_was_dropped(
    browser: Browser, served: DoorProcess
) -> None:
    context = browser.new_context()
    reader = Reader(context, served.url)
    page = reader.open("try")
    page.set_input_files("#file", SCENE)
    page.check("input[value=vqa]")
    page.fill("textarea[name=questions]", "what color is the circle?")
    page.click("text=Submit")
    page.wait_for_selector(".status.succeeded")
    answer = page.locator(".asked dd").inner_text()
    assert re.fullmatch(r"red\s+sure\s+\d+\.\d %", answer)
    assert "generating" in page.locator("table.stages").inner_text()
    assert "what color is the circle?" in page.locator(".snippet pre").nth(0).inner_text()
    reader.check()
    context.close()


def test_a_heat_map_covers_its_picture_exactly(
    reader: Reader, client: Client, ledger: WorkerLedger
) -> None:
    image = client.storage.upload(SCENE)
    both = client.match(image, "a red circle", explain=True)
    alone = client.match("https://example.org/circle.png", "a red circle", explain=True)
    for job in (both, alone):
        scores = [explained("a red circle", "a", "red", "circle")]
        succeed(ledger, job.id, {"kind": "match", "head": "itm", "scores": scores})
    page = reader.open(f"job?id={both.id}")
    wait_until(lambda: page.evaluate(LOADED), "its pictures")
    boxes = page.evaluate(
        "[...document.querySelectorAll('.heat')].map((heat) => [...heat.querySelectorAll('img')]"
        ".map((each) => { const box = each.getBoundingClientRect();"
        " return [box.x, box.y, box.width, box.height].map(Math.round); }))"
    )
    assert len(boxes) == 4
    for under, over in boxes:
        assert under == over
        assert min(under[2:]) > 80
    page = reader.open(f"job?id={alone.id}")
    wait_until(lambda: page.evaluate(LOADED), "its pictures")
    sizes = page.evaluate(
        "[...document.querySelectorAll('.heat')]"
        ".map((each) => [each.offsetWidth, each.offsetHeight])"
    )
    assert all(width == height > 80 for width, height in sizes)


def test_a_queue_is_paused_while_a_job_runs_and_that_job_ends(
    reader: Reader, client: Client, ledger: WorkerLedger
) -> None:
    runs, waits = (client.caption("s3://photos/cat.jpg") for _ in range(2))
    claim = claimed(ledger, runs.id)
    page = reader.open("queues")
    page.evaluate("window.same = true")
    page.click("button:has-text('pause')")
    page.wait_for_selector("button:has-text('resume')")
    assert page.evaluate("window.same && document.activeElement.textContent") == "resume"
    assert ledger.claim(waits.id, "w2") == "paused"
    answer = {"kind": "caption", "captions": [{"text": "a cat"}]}
    assert ledger.succeed(claim, json.dumps(answer), "{}")
    reader.open(f"job?id={runs.id}").wait_for_selector(".status.succeeded")
    reader.open("queues").click("button:has-text('resume')")
    page.wait_for_selector("button:has-text('pause')")
    assert not isinstance(ledger.claim(waits.id, "w2"), str)


def test_a_job_is_cancelled_with_the_keyboard_alone_and_only_once_it_is_confirmed(
    reader: Reader, client: Client
) -> None:
    job = client.caption("s3://photos/cat.jpg", model="m")
    page = reader.open(f"job?id={job.id}")
    for key in ("Enter", "Enter"):
        for _ in range(60):
            page.keyboard.press("Tab")
            focused = page.evaluate("document.activeElement.textContent.trim()")
            if focused in ("Cancel…", "Cancel this job"):
                break
        assert job.info().status == "queued"
        page.wait_for_timeout(2500)  # a fresh copy must not close what was opened
        page.keyboard.press(key)
    page.wait_for_selector(".status.cancelled")
    assert job.info().status == "cancelled"


def test_filters_find_jobs_and_dead_letters_are_tried_again(
    reader: Reader, client: Client, hostile: list[str]
) -> None:
    page = reader.open("jobs")
    page.evaluate("window.same = true")
    page.select_option("select[name=status]", "failed")
    page.click("text=Filter")
    page.wait_for_url("**status=failed**")
    page.wait_for_selector("text=With all jobs of this list")
    assert page.locator("tbody tr").count() == 1
    assert page.evaluate("window.same && document.activeElement.id") == "filter"
    page.go_back()
    page.wait_for_selector(f"tbody tr:nth-child({len(hostile)})")
    assert urlsplit(page.url).query == ""
    page.go_forward()
    page.wait_for_selector("text=With all jobs of this list")
    page.click("tbody th a")
    page.wait_for_selector("h1.id")
    page.evaluate("window.same = true")
    page.click("text=Try again")
    page.wait_for_selector(".status.queued")
    assert page.evaluate("window.same")
    assert client.job(hostile[5]).info().status == "queued"


def test_lists_are_paged_without_loading_the_page(reader: Reader, client: Client) -> None:
    jobs = [client.caption("s3://photos/cat.jpg", model="m") for _ in range(51)]
    page = reader.open("jobs")
    page.evaluate("window.same = true")
    page.click("a:has-text('Older')")
    page.wait_for_selector(f"text={jobs[0].id}")
    assert page.locator("tbody tr").count() == 1
    assert "cursor=" in page.url
    page.click("a:has-text('Newest')")
    page.wait_for_selector(f"text={jobs[-1].id}")
    assert page.evaluate("window.same")
    reader.open("webhooks")
    page.evaluate("window.same = true")
    page.click("text=To be sent")
    page.wait_for_selector("[aria-current=page]:has-text('To be sent')")
    assert page.evaluate("window.same")
    stored = page.evaluate("[{...localStorage}, Object.keys(sessionStorage)]")
    assert stored == [{}, ["htmx-current-path-for-history"]], "no page is kept"


def test_a_renewed_list_keeps_the_focus_on_its_job_and_where_it_was_scrolled(
    browser: Browser, keyed: Keyed, client: Client
) -> None:
    context = browser.new_context(viewport=PHONE)  # type: ignore[arg-type]
    reader = Reader(context, keyed.url)
    reader.sign_in(keyed.keys["operator"])
    job = client.caption("s3://photos/cat.jpg", model="m")
    page = reader.open("jobs")
    page.evaluate("document.querySelector('tbody a').focus({preventScroll: true})")
    page.evaluate("document.querySelector('.scroll').scrollLeft = 60")
    later = client.caption("s3://photos/cat.jpg", model="m")
    page.wait_for_selector(f"text={later.id}")
    assert page.evaluate("document.activeElement.textContent") == job.id
    assert page.evaluate("document.querySelector('.scroll').scrollLeft") == 60
    reader.check()
    context.close()


def test_a_page_stays_as_it_was_while_the_door_does_not_answer(
    reader: Reader, client: Client
) -> None:
    job = client.caption("s3://photos/cat.jpg", model="m")
    page = reader.open("jobs")
    page.route("**/console/jobs", lambda route: route.fulfill(status=502, body="<h1>Bad</h1>"))
    page.wait_for_selector("#lost:visible")
    assert "The door does not answer." in page.locator("#lost").inner_text()
    assert page.locator(f"text={job.id}").count() == 1
    page.click("text=Filter")
    page.wait_for_url("**/console/jobs?**")  # a click is an answer's page, whatever was lost
    page.wait_for_selector("#lost", state="hidden")
    page.unroute("**/console/jobs")


def test_an_action_without_an_answer_is_said_to_be_uncertain_until_another_has_one(
    reader: Reader, client: Client
) -> None:
    def lose(route: Route) -> None:
        if route.request.method == "POST":
            route.abort()
        else:
            route.fallback()

    client.caption("s3://photos/cat.jpg", model="m")
    page = reader.open("queues")
    page.route("**/console/queues", lose)
    page.click("button:has-text('pause')")
    page.wait_for_selector("#unanswered:visible")
    page.evaluate(RENEWED)
    shown = [page.locator(each).is_visible() for each in ("#unanswered", "#lost")]
    assert shown == [True, False], "a renewal says nothing of an action"
    page.unroute("**/console/queues")
    page.click("button:has-text('pause')")
    page.wait_for_selector("button:has-text('resume')")
    page.wait_for_selector("#unanswered", state="hidden")


def test_a_page_that_cannot_be_renewed_says_what_the_door_answered(
    reader: Reader, client: Client, raw_redis: "redis.Redis"
) -> None:
    job = client.caption("s3://photos/cat.jpg", model="m")
    page = reader.open(f"job?id={job.id}")
    raw_redis.delete(keys.job(job.id))
    page.wait_for_selector("#lost:visible")
    said = page.locator("#lost").inner_text()
    assert said.startswith("Not Found: ")
    assert job.id in said
    assert page.locator(".status").inner_text() == "queued"


def test_a_count_that_comes_late_does_not_replace_what_was_opened_meanwhile(
    reader: Reader, client: Client
) -> None:
    def counts(request: Request) -> bool:
        return request.url.endswith("/console/select")

    jobs = [client.caption("s3://photos/cat.jpg", model="m") for _ in range(51)]
    page = reader.open("jobs?kind=caption")
    page.route("**/console/select", lambda route: None)  # it gets no answer
    with page.expect_event("requestfailed", counts):
        page.click("button:has-text('Cancel…')")
        page.click("a:has-text('Older')")
    page.wait_for_selector(f"text={jobs[0].id}")
    assert "cursor=" in page.url
    assert not page.locator("#unanswered").is_visible()


def test_a_page_stays_where_it_was_scrolled_after_the_link_to_its_content(
    reader: Reader, client: Client
) -> None:
    for _ in range(50):
        client.caption("s3://photos/cat.jpg", model="m")
    page = reader.open("jobs")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_url("**/jobs#main")
    page.evaluate("scrollTo(0, 500)")
    page.evaluate(RENEWED)
    assert page.evaluate("scrollY") == 500


def test_the_values_of_a_chart_stay_open_and_in_their_place_and_are_renewed(
    reader: Reader, client: Client, ledger: WorkerLedger
) -> None:
    end_one(client, ledger)
    page = reader.open("")
    page.click("text=Values")
    page.evaluate("scrollTo(0, 1500)")
    for _ in range(4):
        end_one(client, ledger)
    wait_until(lambda: page.evaluate(TOTAL) > 0.49, "the new values")
    assert page.locator("#values tbody").is_visible()
    assert page.evaluate("[scrollY, document.activeElement.id]") == [1500, "values-shown"]


def test_rates_are_drawn_from_their_table_and_follow_it(
    reader: Reader, client: Client, ledger: WorkerLedger
) -> None:
    # The pixels of the chart that have the colour of bars in the light scheme.
    painted = """(() => {
        const canvas = document.querySelector("#chart canvas");
        const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        let count = 0;
        for (let at = 0; at < data.length; at += 4)
            count += data[at] === 0x3b && data[at + 1] === 0x63 && data[at + 2] === 0xd8;
        return count;
    })()"""
    end_one(client, ledger)
    page = reader.open("")
    page.wait_for_selector("#chart canvas")
    wait_until(lambda: page.evaluate(painted) > 100, "a chart")
    page.evaluate("document.querySelector('#chart canvas').same = true")
    for _ in range(4):
        end_one(client, ledger)
    wait_until(lambda: page.evaluate(TOTAL) > 0.49, "the new values")
    assert page.evaluate("document.querySelector('#chart canvas').same"), "it is not made anew"
    page.click("text=Values")
    assert faults_of(page) == []
    page.hover("#chart")
    assert "Per second" in page.locator("#chart").inner_text()
    page.emulate_media(color_scheme="dark")
    wait_until(lambda: page.evaluate(painted) == 0, "the colours of the other scheme")


def test_without_scripts_the_rates_are_a_table_and_a_filter_is_a_form(
    browser: Browser, keyed: Keyed, client: Client, ledger: WorkerLedger
) -> None:
    end_one(client, ledger)
    context = browser.new_context(java_script_enabled=False)
    reader = Reader(context, keyed.url)
    reader.sign_in(keyed.keys["operator"])
    page = reader.open("")
    assert not page.locator("#chart").is_visible()
    page.click("text=Values")
    assert page.locator("#values tbody tr").count() == 60
    assert page.locator("#values tbody").is_visible()
    page.click("nav >> text=Jobs")
    page.select_option("select[name=status]", "failed")
    page.click("text=Filter")
    page.wait_for_url("**status=failed**")
    assert page.locator("text=No job is like that").count() == 1
    context.close()


def test_all_jobs_of_a_list_are_counted_and_exactly_those_are_tried_again(
    reader: Reader, client: Client, ledger: WorkerLedger
) -> None:
    error = JobError(code=ErrorCode.IMAGE_NOT_FOUND, message="gone").model_dump_json()

    def failed(campaign: str) -> str:
        id = client.caption("s3://photos/cat.jpg", metadata={"campaign": campaign}).id
        assert ledger.fail(claimed(ledger, id), error, "{}")
        return id

    meant, others = [failed("spring") for _ in range(60)], [failed("autumn") for _ in range(3)]
    page = reader.open("jobs")
    assert page.locator("text=With all jobs of this list").count() == 0, "not without a filter"
    page.select_option("select[name=status]", "failed")
    page.fill("input[name=name]", "campaign")
    page.fill("input[name=value]", "spring")
    page.click("text=Filter")
    page.wait_for_url("**status=failed**")
    page.evaluate("window.same = true")
    page.click("button:has-text('Try again…')")
    page.wait_for_selector("h1:has-text('Try again: 60 jobs')")
    assert {client.job(id).info().status for id in meant} == {"failed"}, "counted, not changed"
    later = failed("spring")
    page.keyboard.press("Tab")
    assert faults_of(page) == []
    page.set_viewport_size(PHONE)  # type: ignore[arg-type]
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    page.click("text=exactly these 60 jobs")
    page.wait_for_selector("h1:has-text('60 jobs queued again')")
    assert page.evaluate("window.same && location.search").startswith("?status=failed")
    assert {client.job(id).info().status for id in meant} == {"queued"}
    assert {client.job(id).info().status for id in (*others, later)} == {"failed"}


def test_a_page_that_nobody_sees_asks_for_nothing(browser: Browser, keyed: Keyed) -> None:
    context = browser.new_context()
    reader = Reader(context, keyed.url)
    reader.sign_in(keyed.keys["operator"])
    before = len(reader.sent)
    reader.page.wait_for_timeout(3000)
    assert len(reader.sent) > before
    reader.page.add_init_script(
        "Object.defineProperty(document, 'visibilityState', {get: () => 'hidden'})"
    )
    reader.open("").wait_for_load_state("networkidle")
    before = len(reader.sent)
    reader.page.wait_for_timeout(3000)
    assert len(reader.sent) == before
    context.close()


def test_when_the_session_ends_the_page_leads_to_where_to_sign_in(reader: Reader) -> None:
    page = reader.open("queues")
    page.context.clear_cookies()
    page.wait_for_url("**/console/login?next=queues")


def test_no_page_has_a_serious_fault_for_people_who_cannot_see_or_point(
    browser: Browser, keyed: Keyed, hostile: list[str], scheme: Any
) -> None:
    context = browser.new_context(color_scheme=scheme)
    reader = Reader(context, keyed.url)
    reader.sign_in(keyed.keys["operator"])
    faults = {}
    for path in (*PAGES, *(f"job?id={id}" for id in hostile), "job?id=unknown"):
        faults[path] = faults_of(reader.open(path))
    reader.check()
    context.close()
    assert {path: found for path, found in faults.items() if found} == {}


def test_pages_fit_a_phone(browser: Browser, keyed: Keyed, hostile: list[str]) -> None:
    context = browser.new_context(viewport=PHONE)  # type: ignore[arg-type]
    reader = Reader(context, keyed.url)
    reader.sign_in(keyed.keys["operator"])
    wide = {}
    for path in (*PAGES, *(f"job?id={id}" for id in hostile), "job?id=unknown"):
        page = reader.open(path)
        width = page.evaluate("document.documentElement.scrollWidth")
        if width > PHONE["width"]:
            wide[path] = width
    reader.check()
    context.close()
    assert wide == {}


class _Proxy(BaseHTTPRequestHandler):
    """Serves a door under ``/tools/blipq``, a prefix that the door does not get to see."""

    protocol_version = "HTTP/1.1"
    door = ""
    prefix = "/tools/blipq"

    def _pass(self) -> None:
        assert self.path.startswith(self.prefix), self.path
        connection = http.client.HTTPConnection(self.door, timeout=30)
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        path = self.path.removeprefix(self.prefix) or "/"
        connection.request(self.command, path, body, dict(self.headers))
        answer = connection.getresponse()
        data = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        connection.close()

    do_GET = do_POST = _pass

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def proxied(keyed: Keyed) -> Iterator[str]:
    handler = type("Proxy", (_Proxy,), {"door": urlsplit(keyed.url).netloc})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}{_Proxy.prefix}"
    server.shutdown()
    server.server_close()


def test_the_console_works_under_a_path_of_a_proxy(
    browser: Browser, keyed: Keyed, proxied: str, client: Client
) -> None:
    context = browser.new_context()
    reader = Reader(context, proxied)
    reader.sign_in(keyed.keys["operator"])
    (cookie,) = context.cookies()
    assert (cookie.get("path"), cookie.get("httpOnly")) == ("/tools/blipq/console", True)
    job = client.caption("s3://photos/cat.jpg", model="m")
    client.job(job.id).cancel()
    page = reader.open("")
    page.click("nav >> text=Jobs")
    page.select_option("select[name=status]", "cancelled")
    page.click("text=Filter")
    page.wait_for_url("**/tools/blipq/console/jobs?status=cancelled**")
    page.click(f"text={job.id}")
    page.click("text=Forget…")
    page.click("text=Forget this job")
    page.wait_for_url("**/tools/blipq/console/jobs")
    page.click("text=Sign out")
    page.wait_for_url("**/tools/blipq/console/login")
    assert context.cookies() == []
    reader.check()
    context.close()
