"""The page of a comparison in a real browser: on a phone, in both schemes, without a network."""

from importlib import resources
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

from api.console.browsers import chromium
from blipq.contract import MatchRequest
from blipq_worker.compare.cases import Case
from blipq_worker.compare.report import write_page
from worker.compare.candidates import CASES, changed, guard, picture, scaled

pytestmark = pytest.mark.programs

PHONE = {"width": 390, "height": 844}
AXE = (resources.files("axe_playwright_python") / "axe.min.js").read_text()
LONG = Case(
    "long", MatchRequest(image=picture(3), texts=("a" * 90, "<img src=x onerror=alert(1)>"))
)


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compared")
    what = changed(folder / "candidate", "opt", scaled("language_projection.", 3.0))
    guarding = guard(folder / "pictures")
    gone = Case("gone" * 30, CASES[0].request.model_copy(update={"image": picture(99)}))
    comparison = guarding.compare("demo", what, [*CASES, LONG, gone])
    assert comparison.rewritten > 0
    write_page(comparison, guarding.pictures, folder / "page.html")
    return folder / "page.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone_and_loads_nothing(page_file: Path, scheme: str) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium())
        context = browser.new_context(viewport=PHONE, color_scheme=scheme)  # type: ignore[arg-type]
        page = context.new_page()
        sent: list[str] = []
        wrong: list[str] = []
        page.on("request", lambda request: sent.append(request.url.partition(":")[0]))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text))
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.goto(page_file.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        page.evaluate(AXE)
        found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
        browser.close()
    assert wrong == []
    assert set(sent) <= {"file", "data"}
    assert [each["id"] for each in found if each["impact"] in ("serious", "critical")] == []
