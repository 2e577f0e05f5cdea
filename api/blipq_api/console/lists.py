"""Pages that list: what is going on, jobs, dead letters, webhooks, queues, workers and the log."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from blipq.contract import JobInfo, Kind, Status
from blipq.errors import InvalidRequest
from blipq.ledger.cells.operator import runs_of
from blipq.ledger.operator import OperatorLedger
from blipq_api.console.access import call, read_form, to
from blipq_api.console.bulk import offered
from blipq_api.console.filters import filters_of, query_of
from blipq_api.console.pages import rendered
from blipq_api.console.rates import rate_of
from blipq_api.door import caller_of, door_of
from blipq_api.problems import Problem
from blipq_api.routes import jobs, operator

PAGE_OF_JOBS = 50
#: More dead letters are counted, and shown as the newest ones leave.
MOST_DEAD = 100
#: A backlog that workers do not keep up with.
LONG_WAIT_S = 60.0


async def overview(request: Request) -> Response:
    """Queues, workers and rates, and before them what is wrong and what to do."""
    door, admin = door_of(request), "admin" in caller_of(request).scopes
    state = await call(request, operator.queues, "read")
    models = (await call(request, operator.models, "read"))["models"]
    rate = rate_of(*await door.operate(lambda ledger: ledger.ended_after()))
    return rendered(
        request,
        "overview.html",
        state=state,
        models=models,
        rate=rate,
        workers=await _workers(request) if admin else None,
        dead=await door.operate(lambda ledger: ledger.dead()) if admin else 0,
        webhooks=await door.webhooks(lambda outbox: (outbox.pending(), outbox.dead()))
        if admin
        else (0, 0),
        unserved=[each for each in models if each["waiting"] and not each["live_workers"]],
        late=[each for each in state["queues"] if _is_late(each)],
    )


def _is_late(queue: Mapping[str, Any]) -> bool:
    return bool(queue["live_workers"]) and queue.get("oldest_s", 0) > LONG_WAIT_S


async def _workers(request: Request) -> Sequence[Mapping[str, Any]]:
    found: list[dict[str, Any]] = (await call(request, operator.workers, "admin"))["workers"]
    for each in found:
        if isinstance(at := each.get("started_at"), int | float):
            each["started"] = datetime.fromtimestamp(at, UTC)
    return found


async def list_jobs(request: Request) -> Response:
    """Jobs by status, kind, model and one pair of metadata, the newest first."""
    filters = filters_of(request.query_params)
    cursor = request.query_params.get("cursor", "")
    error: str | None = None
    found: dict[str, Any] = {"jobs": []}
    try:
        found = await call(
            request, jobs.list_, "read", limit=str(PAGE_OF_JOBS), cursor=cursor, **query_of(filters)
        )
    except InvalidRequest as refused:
        error = str(refused)
    return rendered(
        request,
        "jobs.html",
        status=200 if error is None else 422,
        jobs=[JobInfo.model_validate(each) for each in found["jobs"]],
        filters=filters,
        filtered=any(filters.values()),
        bulk=offered(caller_of(request), filters) if error is None else {},
        error=error,
        next={**filters, "cursor": found["next_cursor"]} if "next_cursor" in found else None,
        first=not cursor,
        statuses=[*Status],
        kinds=[*Kind],
    )


async def find_job(request: Request) -> Response:
    """Leads from an id that somebody typed to its job."""
    id = request.query_params.get("id", "").strip()
    return to("job", id=id) if id else to("jobs")


async def runs(request: Request) -> Response:
    """Bulks that are worked on, or were lately."""
    caller = caller_of(request)
    found = await door_of(request).operate(runs_of)
    return rendered(request, "runs.html", runs=[each for each in found if caller.sees(each.tenant)])


async def dead_letters(request: Request) -> Response:
    """Jobs that are out of attempts."""
    caller = caller_of(request)

    def read(ledger: OperatorLedger) -> tuple[int, list[JobInfo]]:
        return ledger.dead(), ledger.dead_letters(MOST_DEAD)

    total, found = await door_of(request).operate(read)
    mine = [info for info in found if caller.sees(info.tenant)]
    sees_all = caller.tenant is None or "admin" in caller.scopes
    return rendered(
        request, "dead.html", jobs=mine, more=max(0, total - len(found)) if sees_all else 0
    )


async def webhooks(request: Request) -> Response:
    """Events that wait to be sent, or were given up."""
    dead = request.query_params.get("dead", "true") != "false"
    found = await call(
        request, operator.webhooks, "admin", dead="true" if dead else "false", limit="100"
    )
    events = found["events"]
    for event in events:
        for name in ("at", "dead_at", "due_at"):
            if name in event:
                event[name] = datetime.fromtimestamp(event[name], UTC)
    return rendered(
        request,
        "webhooks.html",
        events=events,
        dead=dead,
        replayed=request.query_params.get("replayed"),
    )


async def replay(request: Request) -> Response:
    """Sends an event again."""
    fields = await read_form(request)
    event = fields.get("event", "")
    if not event:
        raise Problem(422, "invalid_request", "event: which one is to be sent again")
    await call(request, operator.replay, "admin", id=event)
    return to("webhooks", dead="false", replayed=event)


async def queues(request: Request) -> Response:
    """What waits, and for how long."""
    return rendered(request, "queues.html", state=await call(request, operator.queues, "read"))


async def change_queue(request: Request) -> Response:
    """Pauses a queue, or resumes it."""
    fields = await read_form(request)
    client = door_of(request).client
    act = {"pause": client.pause, "resume": client.resume}.get(fields.get("action", ""))
    if act is None:
        raise Problem(422, "invalid_request", "action: pause or resume is expected")
    await act(fields.get("queue", ""))
    return to("queues")


async def log(request: Request) -> Response:
    """Who did what, the newest first."""
    cursor = request.query_params.get("cursor", "")
    found = await call(request, operator.actions, "admin", cursor=cursor)
    for each in found["actions"]:
        each["at"] = datetime.fromisoformat(each["at"])
    return rendered(
        request,
        "log.html",
        actions=found["actions"],
        next=found.get("next_cursor"),
        older=bool(cursor),
    )


async def workers(request: Request) -> Response:
    """The live workers, and the models they serve."""
    admin = "admin" in caller_of(request).scopes
    return rendered(
        request,
        "workers.html",
        models=(await call(request, operator.models, "read"))["models"],
        workers=await _workers(request) if admin else None,
    )
