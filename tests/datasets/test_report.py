"""The contact sheet of a run: what it shows, and that nothing in it runs or is loaded."""

import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from playwright.sync_api import sync_playwright
from typer.testing import Result

from api.console.browsers import chromium
from blipq import Client
from blipq_datasets.report import sheet as sheets
from blipq_datasets.report.rows import Shown

Run = Callable[..., Result]
Answering = Callable[[], Any]

#: Runs wherever a text becomes markup, leaves an attribute, or becomes a style.
HOSTILE = "</style><script>hit()</script><img src=https://x.example/>\"'{{7*7}}\u202e"


def png(number: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (40 + number % 30, 40), (number * 37 % 256, 90, 120)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def sheet(run: Run, answering: Answering, tmp_path: Path) -> Path:
    """A report of 60 rows, some of them bad, repeated, or with texts of strangers."""
    rows = [
        {
            "key": f"row {n} {HOSTILE}" if n % 10 == 0 else f"row-{n}",
            "image": b"" if n % 15 == 4 else png(0 if n % 20 == 7 else n),
            "prompt": HOSTILE if n % 10 == 0 else f"a photo of {n}",
        }
        for n in range(60)
    ]
    rows[8] |= {"prompt": rows[7]["prompt"], "image": rows[7]["image"]}
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "cars.parquet")
    with answering():
        ran = run("submit", "cars.parquet", "--id-column", "key", "--prompt-column", "prompt")
    assert ran.exit_code == 3, ran.output
    ran = run("report", "cars.parquet", "--rows", 50, "--json")
    assert ran.exit_code == 0, (ran.output, ran.exception)
    assert json.loads(ran.stdout) == {"output": "report.html", "rows": 50}
    return tmp_path / "report.html"


def test_a_sheet_shows_rows_and_loads_nothing(sheet: Path) -> None:
    text = sheet.read_text("utf-8")
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert f'http-equiv="Content-Security-Policy" content="{policy}"' in text
    assert "<script" not in text
    assert "\u202e" not in text
    assert not re.search(r"(?:src|href)=\"(?!data:)", text)
    assert "url(" not in text
    assert text.count('<li class="card') == 50
    assert text.count("data:image/jpeg;base64,") == 46
    assert text.count("the picture is empty") == 4
    assert "invalid_request <b>4</b>" in text
    assert "repeated <b>1</b>" in text
    assert "row-1<" in text
    assert "60 rows so far, done" in text


@pytest.mark.programs
def test_a_sheet_is_filtered_in_a_browser_and_fits_a_phone(sheet: Path) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium())
        try:
            asked: list[str] = []
            for scheme, width in (("light", 1280), ("dark", 1280), ("light", 390)):
                context = browser.new_context(
                    color_scheme=scheme,  # type: ignore[arg-type]
                    viewport={"width": width, "height": 844},
                )
                page = context.new_page()
                page.on("request", lambda request: asked.append(request.url))
                page.goto(sheet.as_uri())
                cards = page.locator(".card:visible")
                assert cards.count() == 50
                page.get_by_text("invalid_request").first.click()
                assert cards.count() == 4
                page.locator("label", has_text="answered").click()
                assert cards.count() == 46
                assert page.evaluate("document.documentElement.scrollWidth") <= width
                assert page.evaluate("typeof hit") == "undefined"
                context.close()
            assert {url.partition(":")[0] for url in asked} <= {"file", "data"}
        finally:
            browser.close()


def test_a_report_of_tars_in_s3_has_the_pictures_of_their_members(
    run: Run,
    answering: Answering,
    client: Client,
    bucket: str,
    tar: Callable[..., bytes],
    tmp_path: Path,
) -> None:
    members = {f"{n}.png": png(n) for n in range(5)}
    client.storage.put(f"s3://{bucket}/a.tar", tar(members), content_type="application/x-tar")
    with answering():
        run("submit", f"s3://{bucket}/a.tar", "--journal", "a.bulk")
    ran = run("report", "a.bulk", "--output", "a.html")
    assert ran.exit_code == 0, (ran.output, ran.exception)
    assert (tmp_path / "a.html").read_text().count("data:image/jpeg;base64,") == 5


def test_a_report_needs_the_dataset_as_it_was(
    run: Run, answering: Answering, tmp_path: Path
) -> None:
    (tmp_path / "a.csv").write_text("url\ns3://photos/1.jpg\n")
    with answering():
        assert run("submit", "a.csv").exit_code == 3  # there is no such object
    ran = run("report", "a.csv")
    assert (ran.exit_code, (tmp_path / "report.html").exists()) == (0, True), ran.output
    assert "image_not_found" in (tmp_path / "report.html").read_text()
    (tmp_path / "a.csv").write_text("url\ns3://photos/2.jpg\n")
    ran = run("report", "a.csv")
    assert (ran.exit_code, "has changed" in ran.output) == (2, True)
    manifest = {"custom_id": "1", "kind": "caption", "image": "s3://photos/1.jpg"}
    (tmp_path / "m.jsonl").write_text(json.dumps(manifest) + "\n")
    with answering():
        run("submit", "m.jsonl")
    ran = run("report", "m.jsonl")
    assert (ran.exit_code, "manifest" in ran.output) == (2, True)


def test_a_report_is_not_written_over_its_source_or_its_journal(
    run: Run, answering: Answering, tmp_path: Path
) -> None:
    (tmp_path / "a.csv").write_text("url\ns3://photos/1.jpg\n")
    with answering():
        run("submit", "a.csv")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for output in ("a.csv", tmp_path / "a.csv.bulk"):
        ran = run("report", "a.csv", "--output", output)
        assert (ran.exit_code, "give another file" in ran.output) == (2, True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_report_holds_a_few_pictures_at_a_time(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    small: list[bytes] = []

    def shrunk(data: bytes) -> str:
        small.append(data)
        return f"small {data.decode()}"

    def rows() -> Iterator[Shown]:
        for number in range(50):
            assert number - len(small) < 4  # those before it are drawn, but for these
            key, data = f"row-{number}", f"{number}".encode()
            yield Shown(key, "succeeded", None, None, [], None, False, [], data, None)

    monkeypatch.setattr(sheets, "thumbnail", shrunk)
    found = sheets.drawn(rows(), client.storage)
    assert [(row.key, row.data, picture) for row, picture in found] == [
        (f"row-{number}", None, f"small {number}") for number in range(50)
    ]
