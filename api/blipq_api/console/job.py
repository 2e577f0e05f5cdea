"""One job: its picture beside its answers, how it went, and what can be done about it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from blipq.contract import JobInfo, Receipt, Status
from blipq_api import events
from blipq_api.access.keys import Scope
from blipq_api.console.access import about, call, id_of, read_form, to
from blipq_api.console.pages import rendered
from blipq_api.console.pictures import reference_of
from blipq_api.console.snippets import Snippets
from blipq_api.door import Handler, caller_of, door_of
from blipq_api.problems import Problem
from blipq_api.routes import jobs

#: What the buttons of a job do: the operation, the right that it needs, and the page behind it.
ACTIONS: dict[str, tuple[Handler, Scope, str]] = {
    "cancel": (jobs.cancel, "cancel", "job"),
    "retry": (jobs.retry, "submit", "job"),
    "forget": (jobs.forget, "cancel", "jobs"),
}
_STAGES = (
    ("queue_ms", "in the queue"),
    ("fetch_ms", "fetching the picture"),
    ("decode_wait_ms", "waiting to decode"),
    ("decode_ms", "decoding"),
    ("wait_ms", "waiting for a pass"),
    ("generate_ms", "generating"),
    ("match_ms", "matching"),
    ("embed_ms", "embedding"),
    ("index_ms", "searching the index"),
    ("rerank_ms", "reranking"),
)


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of a job: its share of the whole from ``start`` on, in percent."""

    name: str
    seconds: float
    start: float
    width: float


def stages(receipt: Receipt | None) -> list[Stage]:
    """The stages of a receipt, one after the other."""
    if receipt is None:
        return []
    found = [(name, getattr(receipt, field)) for field, name in _STAGES]
    known = [(name, value) for name, value in found if value]
    whole = sum(value for _, value in known) or 1.0
    made, passed = [], 0.0
    for name, value in known:
        width = max(0.4, 100 * value / whole)
        made.append(Stage(name, value / 1000, min(100 * passed / whole, 100 - width), width))
        passed += value
    return made


async def job(request: Request) -> Response:
    """The page of a job."""
    door, id = door_of(request), id_of(request)
    info = await jobs.known(door, caller_of(request), id)
    asked = await door.operate(lambda ledger: ledger.request(id))
    return rendered(
        request,
        "job.html",
        job=info,
        asked=_shown(asked or {}, info),
        part=_part(asked or {}),
        stages=stages(info.receipt),
        moments=[*_moments(info)],
        snippets=Snippets.of(request, info, asked or {}),
        can_retry=info.ended and info.status is not Status.SUCCEEDED,
    )


def _shown(asked: dict[str, Any], info: JobInfo) -> dict[str, Any]:
    """The request without its picture, for people."""
    left_out = ("kind", "image", "questions", "texts")
    return {name: value for name, value in asked.items() if name not in left_out} | {
        name: asked[name] for name in ("questions", "texts") if name in asked and not info.result
    }


def _part(asked: dict[str, Any]) -> tuple[int, int] | None:
    """The first and the last byte of a picture that is a part of an object."""
    image = reference_of(asked.get("image"))
    if image is None or image.offset is None or image.length is None:
        return None
    return image.offset, image.offset + image.length - 1


def _moments(info: JobInfo) -> Iterator[tuple[str, Any]]:
    yield "queued", info.created_at
    if info.started_at is not None:
        yield "first taken by a worker", info.started_at
    if info.completed_at is not None:
        yield str(info.status), info.completed_at
    else:
        yield "expires", info.expires_at


async def act(request: Request) -> Response:
    """Cancels, retries or forgets a job."""
    fields = await read_form(request)
    id = fields.get("id", "")
    if (action := ACTIONS.get(fields.get("action", ""))) is None or not id:
        raise Problem(422, "invalid_request", "the form names no job, or nothing to do with it")
    handler, scope, page = action
    await call(request, handler, scope, id=id)
    back = fields.get("back", "")
    if back in ("dead",):
        return to(back)
    return to(page, id=id) if page == "job" else to(page)


async def stages_of(request: Request) -> Response:
    """The stages of a job as they come, for its page."""
    return await events.events(about(request, id_of(request)))
