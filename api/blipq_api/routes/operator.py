"""What an operator looks at: models, queues, workers, webhooks, and whether the door is well."""

from collections import Counter
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from blipq.errors import InvalidRequest
from blipq.ledger.cells.operator import actions_of
from blipq.ledger.operator import OperatorLedger, QueueState
from blipq.ledger.views.actions import is_action_id
from blipq.redaction import redacted
from blipq.rights import ANY
from blipq_api.door import caller_of, door_of, shown
from blipq_api.problems import Problem
from blipq_api.routes.jobs import number


async def health(request: Request) -> Response:
    """Whether the ledger answers. Raises QueueUnavailable."""
    await door_of(request).client.ledger.check_models(())
    return shown({"status": "ok"})


async def models(request: Request) -> Response:
    """The served models: live workers and waiting jobs of each."""
    caller, door = caller_of(request), door_of(request)
    states = await door.operate(_models)
    allowed = (ANY,) if caller.key is None else caller.key.models
    if ANY not in allowed:
        states = [each for each in states if each["name"] in allowed]
    return shown({"models": states})


def _models(operator: OperatorLedger) -> list[dict[str, Any]]:
    live: Counter[str] = Counter()
    for worker in operator.workers().values():
        live.update(worker.get("models", ()))
    waiting: Counter[str] = Counter()
    for queue in operator.queues():
        waiting[queue.model] += queue.waiting
    return [
        {"name": name, "live_workers": live[name], "waiting": waiting[name]}
        for name in sorted({*live, *waiting})
    ]


async def queues(request: Request) -> Response:
    """The queues, and how many jobs are open, running and delayed."""

    def read(operator: OperatorLedger) -> tuple[dict[str, int], list[QueueState]]:
        counts = {
            "open": operator.open_jobs(),
            "running": operator.running(),
            "delayed": operator.delayed(),
        }
        return counts, operator.queues()

    counts, states = await door_of(request).operate(read)
    return shown({**counts, "queues": [_without_nulls(state.as_dict()) for state in states]})


async def workers(request: Request) -> Response:
    """The live workers, with what each reports of itself."""
    found = await door_of(request).operate(lambda operator: operator.workers())
    return shown({"workers": [{"name": name, **report} for name, report in sorted(found.items())]})


async def actions(request: Request) -> Response:
    """Who cancelled, queued again, dropped, forgot or replayed what, the newest first."""
    query = dict(request.query_params)
    limit = number(query.pop("limit", "50"), "limit", 1, 500)
    cursor = query.pop("cursor", None)
    if query:
        raise InvalidRequest(f"{min(query)[:100]}: no such filter (accepted: limit, cursor)")
    if cursor is not None and not is_action_id(cursor):
        raise InvalidRequest("cursor: it is none that a list gave")
    found = await door_of(request).operate(lambda operator: actions_of(operator, limit, cursor))
    page: dict[str, Any] = {"actions": [action.as_dict() for action in found]}
    if len(found) == limit:
        page["next_cursor"] = found[-1].id
    return shown(page)


async def webhooks(request: Request) -> Response:
    """Webhook events that wait to be sent, or with ``dead=true`` were given up."""
    query = dict(request.query_params)
    limit = number(query.pop("limit", "50"), "limit", 1, 500)
    dead = query.pop("dead", "false")
    if dead not in ("true", "false") or query:
        raise InvalidRequest("dead: true or false is expected, and no other filter but limit")
    events = await door_of(request).webhooks(
        lambda outbox: outbox.listed(dead=dead == "true", limit=limit)
    )
    return shown({"events": [_redacted(event) for event in events]})


async def replay(request: Request) -> Response:
    """Sends webhook events again."""
    id = request.path_params["id"]
    events = await door_of(request).webhooks(lambda outbox: outbox.replay(id))
    if not events:
        text = f"no event {id[:128]}: never posted, or past its retention"
        raise Problem(404, "event_not_found", text)
    return shown({"events": events}, 202)


def _redacted(event: dict[str, Any]) -> dict[str, Any]:
    """Without the tokens that URLs of receivers carry."""
    texts = {name: redacted(text) for name, text in event.items() if isinstance(text, str)}
    return {**event, **texts}


def _without_nulls(members: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in members.items() if value is not None}
