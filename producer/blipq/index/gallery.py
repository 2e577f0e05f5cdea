"""A page of hits: what ``blipq search --html`` writes.

One HTML file that needs nothing else, not even a network or JavaScript. What it shows came from
strangers, so every text is escaped and every picture is drawn anew.
"""

import base64
import io
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from blipq.contract import Hit, ImageRef, SearchResult
from blipq.errors import BlipqError, InvalidRequest
from blipq.files import whole_file
from blipq.images.decoding import decode
from blipq.pages import environment
from blipq.s3.refusals import s3_errors
from blipq.s3.storage import Storage, arguments_of

_SIDE_PX = 360
_MAX_BYTES = 64 * 2**20
_TIMEOUT_S = 30.0
_CHUNK_BYTES = 256 * 1024
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
    """The hits as one HTML page, with thumbnails of what ``fetch`` reads."""

    def card(hit: Hit) -> Card:
        try:
            data = fetch(ImageRef(uri=hit.uri or hit.id))
            return Card(hit, thumbnail(data))
        except (BlipqError, ValueError):
            return Card(hit, None)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        cards = list(pool.map(card, result.hits))
    template = environment("blipq.index").get_template("gallery.html")
    return template.render(title=title, cards=cards, result=result)


def write_page(result: SearchResult, title: str, path: Path, storage: Storage) -> None:
    """Writes the page of a search's result. Raises BlipqError where the file cannot be written."""

    def fetch(image: ImageRef) -> bytes:
        return fetched(storage, image)

    html = page(result, title, fetch)
    try:
        with whole_file(path) as file:
            file.write(html.encode())
    except OSError as error:
        raise BlipqError(f"cannot write {path}: {error.strerror}") from error


def fetched(storage: Storage, image: ImageRef) -> bytes:
    """An object of S3, or a part.

    Raises BlipqError where it cannot be read, is too large or takes too long. A hit whose image
    lies elsewhere is shown without it.
    """
    if not image.in_s3:
        raise InvalidRequest(f"{image.uri} is not in S3")
    deadline = time.monotonic() + _TIMEOUT_S
    data = io.BytesIO()
    with s3_errors(image.uri):
        body = storage.client.get_object(**arguments_of(image))["Body"]
        with closing(body):
            for piece in body.iter_chunks(_CHUNK_BYTES):
                data.write(piece)
                if data.tell() > _MAX_BYTES or time.monotonic() > deadline:
                    raise InvalidRequest(f"{image.uri} is too large, or takes too long")
    return data.getvalue()
