"""Images into the inbox: bytes, a form's file, or a URL to put them to."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import Response

from blipq.errors import InvalidRequest
from blipq.s3.storage import MAX_UPLOAD_BYTES
from blipq.submission import checked
from blipq_api.door import caller_of, door_of, media_type, read_body, read_json, shown
from blipq_api.problems import Problem

PRESIGNED_FOR_S = 15 * 60
#: Of a form, around its file.
FORM_BYTES = 64 * 1024
#: Suffixes of keys, as the client gives them to files.
_SUFFIXES = {
    "image/jpeg": ".jpg",
    "image/png": ".png",
    "image/webp": ".webp",
    "image/gif": ".gif",
    "image/bmp": ".bmp",
    "image/tiff": ".tiff",
}


class PresignRequest(BaseModel):
    """An upload that is to be signed: the image's SHA-256 in hex, its size, and its type."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    bytes: Annotated[int, Field(ge=1, le=MAX_UPLOAD_BYTES, strict=True)]
    content_type: Annotated[str, Field(pattern=r"^image/[a-z0-9.+-]{1,64}$")] = "image/jpeg"


class Uploaded(BaseModel):
    """An image that is in the inbox, as requests name it."""

    uri: str


class Presigned(BaseModel):
    """Where an image is to be put within 15 minutes, with these headers, and how it is named."""

    method: Literal["PUT"]
    url: str
    headers: dict[str, str]
    uri: str
    expires_at: datetime


async def upload(request: Request) -> Response:
    """Puts an image into the inbox, or signs a URL for that."""
    kind = media_type(request)
    if kind == "application/json":
        return await _presign(request)
    if not (kind.startswith("image/") or kind in ("application/octet-stream", _FORM)):
        text = f"an image, {_FORM} or application/json is expected"
        raise Problem(415, "unsupported_media_type", text)
    door = door_of(request)
    async with door.large_body():
        if kind == _FORM:
            data = await _file_of_form(request)
        else:
            data = await read_body(request, MAX_UPLOAD_BYTES)
        folder = caller_of(request).folder
        image = await door.store(lambda: door.client.storage.upload(data, folder=folder))
    return shown({"uri": image.uri}, 201)


_FORM = "multipart/form-data"


async def _file_of_form(request: Request) -> bytes:
    """The bytes of a form's field ``file``. Raises InvalidRequest for another form."""
    body = await read_body(request, MAX_UPLOAD_BYTES + FORM_BYTES)

    async def stream() -> AsyncIterator[bytes]:
        yield body

    headers = Headers(raw=request.headers.raw)
    parser = MultiPartParser(headers, stream(), max_files=1, max_fields=0)  # type: ignore[arg-type]
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError) as error:
        raise InvalidRequest(f"form: {getattr(error, 'message', error)}") from None
    try:
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise InvalidRequest("form: a field named file, with the image, is expected")
        return await file.read()
    finally:
        await form.close()


async def _presign(request: Request) -> Response:
    body = await read_json(request)
    if not isinstance(body, dict):
        raise InvalidRequest("request: an object is expected")
    upload = checked(PresignRequest, **body)
    door, bucket = door_of(request), door_of(request).settings.inbox_bucket
    suffix = _SUFFIXES.get(upload.content_type, "")
    key = f"{caller_of(request).folder}{upload.sha256}{suffix}"
    expires_at = datetime.now(UTC) + timedelta(seconds=PRESIGNED_FOR_S)
    put = await door.store(
        lambda: door.presigner.put(
            key,
            digest=upload.sha256,
            size=upload.bytes,
            content_type=upload.content_type,
            expires_in=PRESIGNED_FOR_S,
        )
    )
    answer = {
        "method": "PUT",
        "url": put.url,
        "headers": put.headers,
        "uri": f"s3://{bucket}/{key}",
        "expires_at": expires_at.isoformat(timespec="seconds"),
    }
    return shown(answer, 201)
