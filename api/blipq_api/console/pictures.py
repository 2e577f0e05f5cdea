"""Pictures of jobs, and heat maps to lay over them: with the reader's rights, as nothing else."""

import time
from collections.abc import Mapping
from contextlib import closing
from typing import Any

from pydantic import TypeAdapter, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from blipq.contract import Image, ImageRef, JobInfo, MatchResult, SearchResult
from blipq.images.heat import heat_of, png
from blipq.s3.refusals import s3_errors
from blipq.s3.storage import Storage, arguments_of
from blipq_api.console.access import id_of
from blipq_api.door import caller_of, door_of
from blipq_api.problems import Problem
from blipq_api.routes import jobs

MOST_BYTES = 32 * 2**20
TIMEOUT_S = 20.0
_CHUNK_BYTES = 256 * 1024
_REFERENCE: TypeAdapter[ImageRef] = TypeAdapter(Image)
#: What browsers draw, by its first bytes. SVG is none: it may run scripts.
_FORMATS = (
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"GIF87a", "image/gif"),
    (b"GIF89a", "image/gif"),
    (b"BM", "image/bmp"),
)
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; sandbox; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "private, max-age=300",
}


def type_of(data: bytes) -> str | None:
    """The type of a picture by its first bytes; None for what is not shown."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    if data[4:12] in (b"ftypavif", b"ftypavis"):
        return "image/avif"
    return next((name for magic, name in _FORMATS if data.startswith(magic)), None)


async def picture(request: Request) -> Response:
    """The picture of a job, or of its n-th hit. Raises Problem for what is not to be shown."""
    door, caller = door_of(request), caller_of(request)
    info = await jobs.known(door, caller, id_of(request))
    hit = request.query_params.get("hit")
    asked = await door.operate(lambda ledger: ledger.request(info.id)) if hit is None else None
    image = _image(info, asked, hit)
    caller.check_read(image, "image", door.settings.inbox_bucket)
    async with door.large_body():
        data = await door.store(lambda: read(door.client.storage, image))
    if (kind := type_of(data)) is None:
        raise Problem(415, "not_shown", "browsers do not draw this format")
    return Response(data, 200, HEADERS, kind)


async def heat_map(request: Request) -> Response:
    """Where a match that was explained looked: for its n-th text, and of that the n-th word.

    Word 0 is the whole text. Raises Problem where there is no such map.
    """
    info = await jobs.known(door_of(request), caller_of(request), id_of(request))
    scores = info.result.scores if isinstance(info.result, MatchResult) else ()
    text = _place(request.query_params.get("text"))
    word = _place(request.query_params.get("word"))
    map_ = scores[text].map if text is not None and text < len(scores) else None
    try:
        if map_ is None or word is None:
            raise ValueError
        data = png(heat_of(map_, word))
    except ValueError:
        raise Problem(404, "not_found", "there is no such heat map") from None
    return Response(data, 200, HEADERS, "image/png")


def _place(number: str | None) -> int | None:
    """A place in a list, from 0 on, as an address has it."""
    is_number = number is not None and number.isascii() and number.isdecimal() and len(number) < 6
    return int(number) if number is not None and is_number else None


def _image(info: JobInfo, asked: Mapping[str, Any] | None, hit: str | None) -> ImageRef:
    """What the request names, which may be a part of an object; or the picture of a hit."""
    uri: Any = info.image
    if hit is not None:
        hits = info.result.hits if isinstance(info.result, SearchResult) else ()
        place = _place(hit)
        uri = None
        if place is not None and place < len(hits):
            uri = hits[place].uri or hits[place].id
    elif asked is not None:
        uri = asked.get("image")
    image = reference_of(uri)
    if image is None:
        raise Problem(404, "not_found", "there is no such picture")
    if not image.in_s3:
        raise Problem(404, "not_shown", "the door shows pictures in S3 alone, and fetches no URL")
    return image


def reference_of(image: Any) -> ImageRef | None:
    """What a request names, which any client may have written; None for what is no picture."""
    try:
        return _REFERENCE.validate_python(image)
    except ValidationError:
        return None


def read(storage: Storage, image: ImageRef) -> bytes:
    """An object of S3, or a part. Raises Problem for what is too large, or comes too slowly."""
    deadline = time.monotonic() + TIMEOUT_S
    data = bytearray()
    with s3_errors(image.uri):
        found = storage.client.get_object(**arguments_of(image))
        with closing(found["Body"]) as body:
            for piece in body.iter_chunks(_CHUNK_BYTES):
                data += piece
                if len(data) > MOST_BYTES:
                    raise Problem(
                        413, "too_large", f"the most that is shown is {MOST_BYTES:,} bytes"
                    )
                if time.monotonic() > deadline:
                    raise Problem(504, "too_slow", f"S3 sent it for longer than {TIMEOUT_S:g} s")
    return bytes(data)
