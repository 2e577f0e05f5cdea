"""The page of hits holds what strangers wrote and drew, and none of it does anything."""

import io
import re
from html.parser import HTMLParser

from PIL import Image

from blipq.contract import ErrorCode, Hit, ImageRef, SearchResult, Skipped
from blipq.errors import PermanentError
from blipq.index.gallery import page

HOSTILE = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>&amp;{{ 7 * 7 }}"


class Seen(HTMLParser):
    """Every tag with its attributes, and all text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def picture(image: ImageRef) -> bytes:
    if image.key == "gone.png":
        raise PermanentError(ErrorCode.IMAGE_NOT_FOUND, "gone")
    data = io.BytesIO()
    Image.new("RGB", (900, 300), "red").save(data, "PNG")
    return data.getvalue()


def shown() -> tuple[str, Seen]:
    hits = (
        Hit(id=HOSTILE, itc=0.5, itm=0.9, uri="s3://photos/1.png", metadata={HOSTILE: HOSTILE}),
        Hit(id="s3://photos/gone.png", itc=-0.25),
        Hit(id="no uri at all", itc=0.1),
    )
    skipped = (Skipped(id=HOSTILE, code=ErrorCode.IMAGE_CHANGED, message=HOSTILE),)
    html = page(SearchResult(hits=hits, skipped=skipped, checkpoint=HOSTILE), HOSTILE, picture)
    seen = Seen()
    seen.feed(html)
    return html, seen


def test_what_strangers_wrote_is_text() -> None:
    _, seen = shown()
    assert {tag for tag, _ in seen.tags}.isdisjoint({"script", "iframe", "object", "form", "a"})
    assert not [name for _, attrs in seen.tags for name in attrs if name.startswith("on")]
    assert seen.text.count(HOSTILE) == 7
    assert "49" not in seen.text


def test_the_page_needs_nothing_else() -> None:
    html, seen = shown()
    sources = [attrs["src"] or "" for tag, attrs in seen.tags if tag == "img"]
    assert [source.partition(",")[0] for source in sources] == ["data:image/jpeg;base64"]
    assert "http" not in re.sub(r"http-equiv", "", html)
    assert "default-src 'none'" in html


def test_hits_whose_picture_cannot_be_shown_say_so() -> None:
    _, seen = shown()
    assert seen.text.count("no picture") == 2
    assert "90.0" in seen.text
    assert "-0.250" in seen.text
