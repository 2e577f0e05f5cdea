"""All jobs of a filtered list at once: counted first, then exactly those that were counted."""

import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import Response

from blipq.contract import JobInfo, Status
from blipq.ledger.acting import as_one
from blipq.ledger.changes import Action, Change, Changing
from blipq.ledger.erasure import CHUNK as ERASED_AT_ONCE
from blipq.ledger.views.listing import Page, Place, Wanted
from blipq.redaction import redacted
from blipq_api.access.keys import Caller, Scope
from blipq_api.access.selections import Selection
from blipq_api.console.access import read_form
from blipq_api.console.filters import filters_of, query_of
from blipq_api.console.pages import rendered, session_of
from blipq_api.door import Door, caller_of, door_of
from blipq_api.problems import Problem
from blipq_api.routes import jobs

#: Records that a count goes through at most: of those with some metadata it may find few.
MOST_READ = 25_000
#: Jobs of a list that are read at a time, and of those that were counted are shown.
CHUNK, SHOWN = 500, 20


@dataclass(frozen=True, slots=True)
class Bulk:
    """Something to do with many jobs: the right it needs, and for jobs of which statuses it is.

    ``most``: jobs at once. ``change``: how the ledger says which of them it would change.
    """

    scope: Scope
    statuses: tuple[Status, ...]
    most: int
    change: Action
    label: str
    done: str


_ENDED = (Status.FAILED, Status.CANCELLED, Status.EXPIRED)
BULKS = {
    "cancel": Bulk(
        "cancel", (Status.QUEUED, Status.RUNNING), 10_000, "cancel", "Cancel", "cancelled"
    ),
    "retry": Bulk("submit", _ENDED, 10_000, "retry", "Try again", "queued again"),
    # Each takes round trips to S3.
    "forget": Bulk("cancel", (Status.SUCCEEDED, *_ENDED), 1_000, "match", "Forget", "erased"),
}


def offered(caller: Caller, filters: Mapping[str, str]) -> dict[str, str]:
    """What a caller may do with all jobs of a filtered list: labels by action."""
    return {
        action: bulk.label
        for action, bulk in BULKS.items()
        if bulk.scope in caller.scopes
        and any(filters.values())
        and filters["status"] in ("", *bulk.statuses)
    }


async def select(request: Request) -> Response:
    """Counts what would be changed, and asks."""
    fields = await read_form(request)
    action, filters = fields.get("action", ""), filters_of(fields)
    bulk = _bulk(request, action)
    if not any(filters.values()):
        raise Problem(422, "invalid_request", "filter the list of jobs first")
    door, caller, session = door_of(request), caller_of(request), session_of(request)
    assert session is not None
    wanted = jobs.wanted_of(query_of(filters), caller)
    counted = await _counted(door, bulk, wanted)
    ids = [*counted.ids]
    # Without values of metadata: the log outlives the jobs.
    target = json.dumps({name: each for name, each in filters.items() if each and name != "value"})
    selection = Selection(action, ids, caller.only_tenant, target)
    token = await door.selections.keep(session, selection)
    given = {name: value for name, value in filters.items() if value}
    return rendered(
        request,
        "bulk.html",
        # Loaded again, the page is the list: nobody opens a count by its address.
        headers={"HX-Push-Url": f"jobs?{urlencode(given)}"},
        action=action,
        bulk=bulk,
        filters=given,
        token=token,
        count=len(ids),
        more=counted.more,
        most_read=MOST_READ,
        jobs=counted.shown,
    )


async def act(request: Request) -> Response:
    """Does it to the jobs that were counted. What is in no state for it by now stays as it is."""
    fields = await read_form(request)
    door, session = door_of(request), session_of(request)
    assert session is not None
    chosen = await door.selections.take(session, fields.get("selection", ""))
    if chosen is None or chosen.tenant != caller_of(request).only_tenant:
        text = "these jobs were counted too long ago, or something was done with them already"
        raise Problem(409, "stale_selection", text)
    bulk = _bulk(request, chosen.action)
    with as_one(chosen.target):
        count, left = await _done(door, chosen)
    return rendered(
        request,
        "bulk.html",
        action=chosen.action,
        bulk=bulk,
        token="",
        count=count,
        counted=len(chosen.ids),
        left=left,
    )


async def _done(door: Door, chosen: Selection) -> tuple[int, list[str]]:
    """How many jobs were changed, and what an erasure left elsewhere."""
    if chosen.action == "forget":
        return await _erased(door, chosen.ids)
    change = door.client.cancel_all if chosen.action == "cancel" else door.client.retry_all
    return await change(chosen.ids), []


async def _erased(door: Door, ids: list[str]) -> tuple[int, list[str]]:
    """A turn for each chunk: an erasure may take minutes. What is queued again by then stays."""
    count = 0
    left: list[str] = []
    for at in range(0, len(ids), ERASED_AT_ONCE):
        report = await door.forget(ids[at : at + ERASED_AT_ONCE])
        count += len(report.jobs)
        left += map(redacted, report.left)
    return count, left


def _bulk(request: Request, action: str) -> Bulk:
    """Raises Problem for who lacks the right, and for what is no action."""
    if (bulk := BULKS.get(action)) is None:
        raise Problem(422, "invalid_request", f"action: one of {', '.join(BULKS)} is expected")
    caller_of(request).require(bulk.scope)
    return bulk


# -- the dry run --


@dataclass(slots=True)
class _Counted:
    """Jobs that would be changed: the ids of all, of which the first are shown.

    ``more``: there may be others beyond the bounds.
    """

    ids: dict[str, None] = field(default_factory=dict)
    shown: list[JobInfo] = field(default_factory=list)
    more: bool = False


async def _counted(door: Door, bulk: Bulk, wanted: Wanted | None) -> _Counted:
    """Whole records are large, so that few are kept, and so is the work: it takes a turn."""
    counted, read = _Counted(), 0
    async with door.count(), aclosing(_pages(door, bulk, wanted)) as pages:
        async for page in pages:
            infos = {info.id: info for info in page.jobs if info.id not in counted.ids}
            kept = await _would(door, bulk.change, [*infos])
            kept = kept[: bulk.most - len(counted.ids)]
            counted.ids |= dict.fromkeys(kept)
            counted.shown += [infos[id] for id in kept[: SHOWN - len(counted.shown)]]
            read += page.read
            if len(counted.ids) >= bulk.most or read >= MOST_READ:
                counted.more = True
                break
    return counted


async def _would(door: Door, action: Action, ids: list[str]) -> list[str]:
    """Those of the jobs that a change would change."""
    changing = Changing(Change.of(action, ids, dry_run=True))
    found: list[str] = []
    while (chunk := changing.next()) is not None:
        changed = await door.client.ledger.change(chunk)
        changing.took(changed)
        found += changed.ids
    return found


async def _pages(door: Door, bulk: Bulk, wanted: Wanted | None) -> AsyncGenerator[Page]:
    """Pages of the lists of each status that the change is for, by the lists' indexes."""
    if wanted is None:
        return
    for status in bulk.statuses:
        if wanted.status in (None, status):
            after: Place | None = None
            while True:
                page = await _page(door, replace(wanted, status=status), after)
                yield page
                if (after := page.next) is None:
                    break


async def _page(door: Door, wanted: Wanted, after: Place | None) -> Page:
    """A turn for each, so that a long count holds nobody up."""

    def read(ledger: Any) -> Page:
        found: Page = ledger.listing.page(wanted, limit=CHUNK, after=after)
        return found

    return await door.operate(read)
