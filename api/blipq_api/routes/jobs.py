"""Jobs: submit, look up, wait, list, cancel, retry, forget."""

import base64
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any, TypeVar, cast

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response

from blipq.client.job import fetched, is_elsewhere, result_of
from blipq.client.waiting import not_found
from blipq.contract import JobInfo, Kind, Options, Status, request_adapter
from blipq.contract import Request as JobRequest
from blipq.errors import InvalidRequest, ResultTimeout
from blipq.ledger.views.listing import Place, Wanted
from blipq.redaction import redacted
from blipq.submission import explain
from blipq_api.access.keys import Caller, Scope
from blipq_api.door import (
    Door,
    caller_of,
    door_of,
    job_answer,
    read_body,
    read_json,
    shown,
    while_connected,
)
from blipq_api.problems import Problem

T = TypeVar("T")

LONGEST_WAIT_S = 60.0
MOST_LISTED = 500
#: Times of lists lie before the year 2300.
LATEST_S = 10_413_792_000
_PREFER = re.compile(r"(?:^|[,;\s])wait\s*=\s*(\d{1,6})(?:$|[,;\s])", re.I)
#: Ids that callers choose: no slash, so that a path can hold them.
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{7,127}")
_METADATA = "metadata."
_FILTERS = "status, kind, model, tenant, since, until, metadata.NAME, limit, cursor"


def job_request_of(body: Any, key: str | None = None) -> tuple[JobRequest, Options]:
    """A request and its options from a body: the request's fields, and ``options`` beside them.

    ``key``: an idempotency key that came as a header. Raises InvalidRequest.
    """
    if not isinstance(body, dict):
        raise InvalidRequest("request: an object with a kind and its fields is expected")
    fields: dict[str, Any] = dict(body)
    options = fields.pop("options", None)
    options = {} if options is None else options
    if not isinstance(options, dict):
        raise InvalidRequest("options: an object is expected")
    if key is not None and options.get("idempotency_key", key) != key:
        raise InvalidRequest("options.idempotency_key: the Idempotency-Key header has another")
    options = options if key is None else {**options, "idempotency_key": key}
    try:
        request = request_adapter.validate_python(fields)
        return request, Options.model_validate(options)
    except ValidationError as error:
        raise InvalidRequest(_explained(error)) from None


def _explained(error: ValidationError) -> str:
    if error.title == Options.__name__:
        return explain(error, Options, under="options.")
    return explain(error, JobRequest)


async def submit(request: Request) -> Response:
    """Records a job, and with ``Prefer: wait`` waits for it."""
    return await _submit(request, None)


async def put(request: Request) -> Response:
    """Records a job under an id of the caller's."""
    id = request.path_params["id"]
    if not _ID.fullmatch(id):
        text = "id: 8 to 128 letters, digits, dots, dashes and underscores are expected"
        raise InvalidRequest(text)
    return await _submit(request, id)


async def _submit(request: Request, id: str | None) -> Response:
    door, caller = door_of(request), caller_of(request)
    wait = wait_of(request)
    job_request, options = job_request_of(
        await read_json(request), request.headers.get("idempotency-key")
    )
    id = id or await door.client.ledger.make_id(options)
    submission = caller.submission(job_request, options, id, door.settings.inbox_bucket)
    submission = replace(submission, traceparent=request.headers.get("traceparent"))
    job: Any = await door.client.submit(submission)
    if wait:
        info = await ended(request, door, job.id, wait, "submit")
        return job_answer(info, Location=_path(request, job.id), Preference_Applied="wait")
    body = {"id": job.id, **links(request, job.id)}
    return shown(body, 202, Location=_path(request, job.id))


def _path(request: Request, id: str) -> str:
    return f"{request.scope.get('root_path', '')}/v1/jobs/{id}"


def links(request: Request, id: str) -> dict[str, str]:
    """Where to look a job up, relative to the door's host."""
    path = _path(request, id)
    return {
        "status_url": path,
        "result_url": f"{path}/result",
        "events_url": f"{path}/events",
        "cancel_url": f"{path}/cancel",
    }


def wait_of(request: Request) -> float:
    """How long the caller wants to wait: ``?wait=30`` or ``Prefer: wait=30``; 0 is not at all."""
    given = request.query_params.get("wait")
    if given is None:
        match = _PREFER.search(request.headers.get("prefer", ""))
        return min(float(match[1]), LONGEST_WAIT_S) if match else 0.0
    return min(number(given, "wait", 0, 1_000_000), LONGEST_WAIT_S)


def number(text: str, name: str, least: int, most: int) -> int:
    """A whole number of a query. Raises InvalidRequest."""
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and least <= int(text) <= most):
        raise InvalidRequest(f"{name}: a number from {least} to {most} is expected")
    return int(text)


async def known(door: Door, caller: Caller, id: str) -> JobInfo:
    """The job as it is now. Raises JobNotFound, also for another tenant's."""
    info = await door.client.ledger.read(id)
    if info is None or not caller.sees(info.tenant):
        raise not_found(id[:128])
    return info


async def ended(
    request: Request, door: Door, id: str, seconds: float, scope: Scope = "read"
) -> JobInfo:
    """The job when it has ended, or after these seconds.

    Raises Problem where the key or the session ended meanwhile.
    """
    try:
        info = await while_connected(request, door, door.client.job(id).wait(seconds))
    except ResultTimeout:
        info = None
    if info is None:
        info = await door.client.job(id).info()
    if not await door.still_allows(request, scope, info.tenant):
        raise Problem(401, "unauthorized", "the key or the session has ended")
    return info


async def read(request: Request) -> Response:
    """A job, at once or when it has ended."""
    door, id, wait = door_of(request), request.path_params["id"], wait_of(request)
    info = await known(door, caller_of(request), id)
    if wait and not info.ended:
        await read_body(request, 0)
        return job_answer(await ended(request, door, id, wait), Preference_Applied="wait")
    return job_answer(info)


async def result(request: Request) -> Response:
    """A job's result alone; the job while it is open."""
    door, id, wait = door_of(request), request.path_params["id"], wait_of(request)
    info = await known(door, caller_of(request), id)
    if wait and not info.ended:
        await read_body(request, 0)
        info = await ended(request, door, id, wait)
    if not info.ended:
        return job_answer(info)
    if is_elsewhere(info):
        elsewhere = info
        info = await door.store(lambda: fetched(elsewhere, door.client.storage))
    found: Any = result_of(info)
    return shown(found)


async def cancel(request: Request) -> Response:
    """Cancels a job; one that had ended stays as it is."""
    door, caller, id = door_of(request), caller_of(request), request.path_params["id"]
    await known(door, caller, id)
    await door.client.job(id).cancel()
    return job_answer(await known(door, caller, id), 200)


async def retry(request: Request) -> Response:
    """Queues a job again that ended without a result, with fresh attempts and a new deadline."""
    door, caller, id = door_of(request), caller_of(request), request.path_params["id"]
    info = await known(door, caller, id)
    if not await door.client.retry_all([id]):
        text = f"{id} is {info.status}: only what ended without a result is tried again"
        raise Problem(409, "not_retryable", text)
    return job_answer(await known(door, caller, id), 202)


def _check_ended(info: JobInfo) -> None:
    """Raises Problem for a job that is open."""
    if not info.ended:
        raise Problem(409, "job_open", f"{info.id} is {info.status}: cancel it first")


async def forget(request: Request) -> Response:
    """Erases a job that has ended, with its result, events, upload, output and index entry."""
    door, caller, id = door_of(request), caller_of(request), request.path_params["id"]
    _check_ended(await known(door, caller, id))
    report = await door.forget([id])
    if not report.jobs:  # somebody has queued it again, or erased it
        _check_ended(await known(door, caller, id))
        raise not_found(id[:128])
    return shown({**asdict(report), "left": [redacted(each) for each in report.left]})


# -- lists --


async def list_(request: Request) -> Response:
    """Jobs, the newest first, by status, kind, model, tenant, time and metadata."""
    door, caller = door_of(request), caller_of(request)
    query = dict(request.query_params)
    limit = number(query.pop("limit", "50"), "limit", 1, MOST_LISTED)
    after = _cursor(query.pop("cursor", None))
    wanted = wanted_of(query, caller)
    if query:
        raise InvalidRequest(f"{min(query)[:100]}: no such filter (accepted: {_FILTERS})")
    if wanted is None:
        return shown({"jobs": [], "read": 0})
    page = await door.operate(
        lambda operator: operator.listing.page(wanted, limit=limit, after=after)
    )
    answer: dict[str, Any] = {"jobs": [_listed(info) for info in page.jobs], "read": page.read}
    if page.next is not None:
        answer["next_cursor"] = _cursor_of(page.next)
        answer["next_from"] = page.next.at.isoformat(timespec="milliseconds")
    return shown(answer)


def wanted_of(query: dict[str, str], caller: Caller) -> Wanted | None:
    """What is listed, of which the filters are taken out of the query; None of nothing.

    Raises InvalidRequest.
    """
    tenant, own = query.pop("tenant", None), caller.only_tenant
    wanted = Wanted(
        status=_one_of(Status, query.pop("status", None), "status"),
        kind=_one_of(Kind, query.pop("kind", None), "kind"),
        model=query.pop("model", None),
        tenant=tenant if own is None else own,
        since=_time(query.pop("since", None), "since"),
        until=_time(query.pop("until", None), "until"),
        metadata={
            name.removeprefix(_METADATA): query.pop(name)
            for name in [*query]
            if name.startswith(_METADATA)
        },
    )
    return wanted if own is None or tenant in (None, own) else None


def _time(text: str | None, name: str) -> datetime | None:
    """A time of RFC 3339; one without an offset is UTC."""
    if text is None:
        return None
    try:
        time = datetime.fromisoformat(text)
        time = time if time.tzinfo is not None else time.replace(tzinfo=UTC)
        if not 0 <= time.timestamp() < LATEST_S:
            raise ValueError
    except (ValueError, OverflowError):
        raise InvalidRequest(f"{name}: a time such as 2026-01-31T12:00:00Z is expected") from None
    return time


def _listed(info: JobInfo) -> dict[str, Any]:
    """A job without its result, which may be large."""
    return info.model_dump(mode="json", exclude_none=True, exclude={"result"})


def _cursor_of(place: Place) -> str:
    return base64.urlsafe_b64encode(f"{place.ms} {place.id}".encode()).decode()


def _cursor(text: str | None) -> Place | None:
    if text is None:
        return None
    try:
        ms, _, id = base64.b64decode(text, altchars=b"-_", validate=True).decode().partition(" ")
        if not (ms.isdecimal() and ms.isascii() and int(ms) < LATEST_S * 1000):
            raise ValueError
        return Place(int(ms), id)
    except ValueError:
        raise InvalidRequest("cursor: it is none that a list gave") from None


def _one_of(kind: Callable[[str], T], text: str | None, name: str) -> T | None:
    try:
        return None if text is None else kind(text)
    except ValueError:
        known = ", ".join(cast(Any, kind))
        raise InvalidRequest(f"{name}: one of {known} is expected") from None
