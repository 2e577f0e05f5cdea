"""The page of a comparison in a real browser: on a phone, light and dark."""

from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from api.console.browsers import chromium
from blipq.contract import MatchRequest
from blipq_worker.compare.cases import Case, Skipped
from blipq_worker.compare.report import write_page
from worker.compare.candidates import CASES, changed, guard, picture, scaled

pytestmark = pytest.mark.programs

PHONE: Any = {"width": 390, "height": 844}
DESK: Any = {"width": 1280, "height": 900}
AXE = (resources.files("axe_playwright_python") / "axe.min.js").read_text()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with all that a page may have: long names and texts, and jobs without an answer."""
    folder = tmp_path_factory.mktemp("report")
    what = changed(
        folder / "a-candidate-whose-path-is-long" / "opt-next-after-the-second-round",
        "itm",
        scaled("itm_head.", 3.0),
    )
    long = MatchRequest(image=picture(2), texts=("x" * 300, "a red circle"))
    cases = [*CASES, Case("order-" + 60 * "7", long)]
    skipped = [Skipped("job_" + 40 * "0", "s3://photos/" + 80 * "a" + ": it is gone")]
    guarding = guard(folder / "pictures")
    comparison = guarding.compare("demo", what, cases, skipped)
    write_page(comparison, guarding.pictures, folder / "page.html")
    return folder / "page.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium())
        yield browser
        browser.close()


@pytest.fixture(params=["light", "dark"])
def scheme(request: pytest.FixtureRequest) -> Any:
    return request.param


def opened(browser: Browser, report: Path, viewport: Any, scheme: Any) -> tuple[Page, list[str]]:
    """The page, and what the browser says is wrong with it, or that it loads."""
    page = browser.new_context(viewport=viewport, color_scheme=scheme).new_page()
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda sent: wrong.append(sent.url))
    page.goto(report.as_uri())
    loaded = [each for each in wrong if each != report.as_uri() and not each.startswith("data:")]
    return page, loaded


@pytest.mark.parametrize("viewport", [PHONE, DESK], ids=["phone", "desk"])
def test_the_page_fits_its_screen_and_shows_its_pictures(
    browser: Browser, report: Path, scheme: Any, viewport: Any
) -> None:
    page, wrong = opened(browser, report, viewport, scheme)
    assert wrong == []
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    shown = page.evaluate("[...document.images].map((each) => each.naturalWidth)")
    assert shown
    assert all(shown)
    # What is wider than its place scrolls there, or breaks: nothing is cut off.
    cut = page.evaluate(
        "[...document.querySelectorAll('td, th, p, li, h3')]"
        ".filter((each) => each.scrollWidth > each.clientWidth + 1 && !each.closest('.scroll'))"
        ".map((each) => each.outerHTML.slice(0, 100))"
    )
    assert cut == []
    page.context.close()


def test_the_page_has_no_serious_fault_for_people_who_cannot_see_well(
    browser: Browser, report: Path, scheme: Any
) -> None:
    page, _ = opened(browser, report, PHONE, scheme)
    page.evaluate(AXE)
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    serious = {
        each["id"]: [node["html"][:200] for node in each["nodes"]][:3]
        for each in found
        if each["impact"] in ("serious", "critical")
    }
    assert serious == {}
    page.context.close()


def test_dark_is_dark_and_light_is_light(browser: Browser, report: Path, scheme: Any) -> None:
    page, _ = opened(browser, report, PHONE, scheme)
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(each) for each in colour.removeprefix("rgb(").rstrip(")").split(","))
    assert (brightness < 3 * 128) == (scheme == "dark")
    page.context.close()
