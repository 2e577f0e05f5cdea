"""Try it: one picture, one question, and the answer."""

from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import Response

from blipq.contract import Kind
from blipq.errors import InvalidRequest
from blipq.s3.storage import MAX_UPLOAD_BYTES
from blipq_api.console.access import MOST_FIELDS, MOST_FORM_BYTES, call, check_token, to
from blipq_api.console.pages import rendered
from blipq_api.door import caller_of, door_of, media_type, read_body
from blipq_api.problems import Problem
from blipq_api.routes import operator
from blipq_api.routes.jobs import job_request_of

#: What the form has for each kind; a field of several lines is a list.
FIELDS: dict[Kind, tuple[str, ...]] = {
    Kind.CAPTION: ("prompt",),
    Kind.VQA: ("questions",),
    Kind.MATCH: ("texts",),
    Kind.DESCRIBE: ("questions", "texts"),
    Kind.EMBED: ("index",),
    Kind.SEARCH: ("index", "text"),
}
_LISTS = ("questions", "texts")
_START = {"kind": "caption", "model": "default", "questions": "what is in the picture?"}


async def form(request: Request) -> Response:
    """The form."""
    return await _form(request, {**_START, **request.query_params})


async def _form(
    request: Request, values: Mapping[str, str], error: str | None = None, status: int = 200
) -> Response:
    models = (await call(request, operator.models, "read"))["models"]
    return rendered(
        request,
        "try.html",
        status=status,
        values={name: values.get(name, "") for name in _NAMES},
        kinds=[*Kind],
        fields=FIELDS,
        models=models,
        error=error,
    )


_NAMES = ("kind", "model", "image", "prompt", "questions", "texts", "index", "text")


async def submit(request: Request) -> Response:
    """Puts the picture into the inbox and submits the job. Errors are shown in the form."""
    door, caller = door_of(request), caller_of(request)
    async with door.large_body():
        fields, data = await _sent(request)
        check_token(request, fields.pop("form_token", ""))
        try:
            if data:
                storage = door.client.storage
                uploaded = await door.store(lambda: storage.upload(data, folder=caller.folder))
                fields["image"] = uploaded.uri
            asked, options = job_request_of(body_of(fields))
            inbox = door.settings.inbox_bucket
            id = await door.client.ledger.make_id(options)
            job: Any = await door.client.submit(caller.submission(asked, options, id, inbox))
        except InvalidRequest as error:
            return await _form(request, fields, str(error), 422)
        except Problem as error:
            if error.status != 403:
                raise
            return await _form(request, fields, str(error), 403)
    return to("job", id=job.id)


def body_of(fields: Mapping[str, str]) -> dict[str, Any]:
    """A form's fields as the body of a submit: those of its kind that are filled in."""
    kind = fields.get("kind", "")
    if kind not in [*Kind]:
        raise InvalidRequest("kind: choose what the job is to do")
    body: dict[str, Any] = {"kind": kind}
    if image := fields.get("image", "").strip():
        body["image"] = image
    for name in FIELDS[Kind(kind)]:
        text = fields.get(name, "").strip()
        if text:
            body[name] = _lines(text) if name in _LISTS else text
    if model := fields.get("model", "").strip():
        body["options"] = {"model": model}
    if "image" not in body and kind != Kind.SEARCH:
        raise InvalidRequest("image: drop a picture, or name one in S3")
    return body


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


async def _sent(request: Request) -> tuple[dict[str, str], bytes]:
    """The fields of the form, and the bytes of its picture. Raises Problem."""
    if media_type(request) != "multipart/form-data":
        raise Problem(415, "unsupported_media_type", "a form with a picture is expected")
    body = await read_body(request, MAX_UPLOAD_BYTES + MOST_FORM_BYTES)

    async def stream() -> AsyncIterator[bytes]:
        yield body

    headers = Headers(raw=request.headers.raw)
    parser = MultiPartParser(  # type: ignore[arg-type,unused-ignore]
        headers,
        stream(),  # type: ignore[arg-type]
        max_files=1,
        max_fields=MOST_FIELDS,
        max_part_size=MOST_FORM_BYTES,
    )
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError) as error:
        raise Problem(
            400, "invalid_form", f"the form cannot be read: {getattr(error, 'message', error)}"
        ) from None
    try:
        file = form.get("file")
        data = await file.read() if isinstance(file, UploadFile) else b""
        fields = {name: value for name, value in form.items() if isinstance(value, str)}
    finally:
        await form.close()
    return fields, data
