"""A page of hits: ``python -m blipq_worker.index.gallery FILE`` with a search's result on stdin.

One HTML file that needs nothing else, not even a network or JavaScript. What it shows came from
strangers, so every text is escaped and every picture is drawn anew.
"""

import argparse
import base64
import io
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from blipq.contract import Hit, ImageRef, SearchResult
from blipq.errors import WorkError
from blipq.s3.storage import Storage
from blipq.settings import Settings
from blipq.submission import checked
from blipq_worker.images.decoding import decode

_SIDE_PX = 360
_MAX_BYTES = 64 * 2**20
_TIMEOUT_S = 30.0
_AT_ONCE = 8


@dataclass(frozen=True)
class Card:
    """A hit and its picture as a data URI, or None where it cannot be shown."""

    hit: Hit
    picture: str | None


def thumbnail(data: bytes) -> str:
    """A small JPEG of an image, as a data URI. Raises PermanentError."""
    image = decode(data)
    image.thumbnail((_SIDE_PX, _SIDE_PX))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def page(result: SearchResult, title: str, fetch: Callable[[ImageRef], bytes]) -> str:
    """The page as HTML."""

    def card(hit: Hit) -> Card:
        try:
            data = fetch(ImageRef(uri=hit.uri or hit.id))
            return Card(hit, thumbnail(data))
        except (WorkError, ValueError):
            return Card(hit, None)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        cards = list(pool.map(card, result.hits))
    environment = Environment(
        loader=PackageLoader("blipq_worker.index", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("gallery.html").render(title=title, cards=cards, result=result)


def main(argv: list[str] | None = None) -> int:
    """Writes the page; the exit code."""
    from blipq_worker.images.fetch import Fetcher

    parser = argparse.ArgumentParser(prog="blipq search --html")
    parser.add_argument("path", type=Path)
    parser.add_argument("--title", default="hits")
    arguments = parser.parse_args(argv)
    result = SearchResult.model_validate_json(sys.stdin.read())
    fetcher = Fetcher(Storage(checked(Settings)), max_bytes=_MAX_BYTES, timeout_s=_TIMEOUT_S)

    def fetch(image: ImageRef) -> bytes:
        return fetcher.fetch(image).data

    try:
        arguments.path.write_text(page(result, arguments.title, fetch), encoding="utf-8")
    except OSError as error:
        print(f"blipq: cannot write {arguments.path}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
