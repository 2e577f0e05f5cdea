"""A job's stages as server-sent events, which go on where a lost connection ended.

The ledger keeps no log of stages, so a stage's number is worked out from the job's record: what was
sent before the connection was lost, by whichever door, has the same numbers again.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from blipq.contract import JobInfo, Status
from blipq.errors import InvalidRequest, QueueUnavailable
from blipq_api.door import caller_of, door_of
from blipq_api.routes.jobs import known

#: A stream ends after this; whoever wants more comes again with the last number.
LONGEST_STREAM_S = 600.0
HEARTBEAT_S = 15.0
#: Between two reads of an open job: longer the more streams there are, up to the second number.
PAUSE_S, LONGEST_PAUSE_S = 0.25, 10.0
#: Looks of one door in a second, at most.
LOOKS_PER_S = 400
#: A stream ends so long after its key or its session did, and a pause between reads at the most.
RECHECK_S = 5.0
#: A stream ends when Redis was away for so long.
PATIENCE_S = 30.0
#: It has no number: the next stream goes on behind the last stage.
CLOSED = (
    'event: closed\ndata: {"code": "unauthorized", "detail": '
    '"the key or the session of this stream has ended"}\n\n'
)
HEADERS = {"X-Accel-Buffering": "no"}


@dataclass(frozen=True, slots=True)
class Stage:
    """One event. ``number`` grows over a job's life."""

    number: int
    name: str
    data: dict[str, Any]

    def text(self) -> str:
        """The event on the wire. JSON has no line ends here."""
        return f"id: {self.number}\nevent: {self.name}\ndata: {json.dumps(self.data)}\n\n"


def stages(info: JobInfo) -> Iterator[Stage]:
    """All stages that a record shows, in order.

    Four numbers for each delivery to a worker: 4n it waits after n of them, 4n - 1 the n-th runs,
    and 4n + 1 the end. Of earlier deliveries only that they were is known.
    """
    yield Stage(0, "queued", {"id": info.id, "status": "queued", "at": info.created_at.isoformat()})
    for attempt in range(1, info.attempts + 1):
        last = attempt == info.attempts
        running: dict[str, Any] = {"id": info.id, "status": "running", "attempt": attempt}
        if attempt == 1 and info.started_at is not None:
            running["at"] = info.started_at.isoformat()
        yield Stage(4 * attempt - 1, "running", running)
        if not last or info.status is Status.QUEUED:
            yield Stage(4 * attempt, "retrying", _retrying(info, attempt, last=last))
    if info.ended:
        record = info.model_dump(mode="json", exclude_none=True)
        yield Stage(4 * info.attempts + 1, str(info.status), record)


def _retrying(info: JobInfo, attempt: int, *, last: bool) -> dict[str, Any]:
    retrying: dict[str, Any] = {"id": info.id, "status": "queued", "attempt": attempt}
    if last and info.last_error is not None:
        retrying["error"] = info.last_error.model_dump(mode="json")
    return retrying


async def events(request: Request) -> Response:
    """The stages of a job behind ``Last-Event-ID``, until it has ended."""
    door, id = door_of(request), request.path_params["id"]
    last = _last_number(request)
    info = await known(door, caller_of(request), id)
    if info.ended and all(stage.number <= last for stage in stages(info)):
        return Response(status_code=204)  # it makes EventSource stop asking
    stream = _Stream(request, info, last)
    return StreamingResponse(stream.run(), media_type="text/event-stream", headers=HEADERS)


def _last_number(request: Request) -> int:
    given = request.headers.get("last-event-id", "-1")
    if not (given.removeprefix("-").isdecimal() and given.isascii() and len(given) < 10):
        raise InvalidRequest("Last-Event-ID: it is none of this stream")
    return int(given)


class _Stream:
    """One caller's stream."""

    def __init__(self, request: Request, info: JobInfo, last: int) -> None:
        self._request = request
        self._door = door_of(request)
        self._info = info
        self._last = last
        self._ending = time.monotonic() + LONGEST_STREAM_S
        self._away_since: float | None = None
        self._checked_at = time.monotonic()

    async def run(self) -> AsyncIterator[str]:
        self._door.streams += 1
        try:
            async with self._door.client.notifier.watch([self._info.id]) as inbox:
                yield "retry: 1000\n\n"
                beat = time.monotonic()
                while True:
                    for stage in self._news():
                        yield stage.text()
                        beat = time.monotonic()
                    if self._is_over():
                        return
                    if time.monotonic() > beat + HEARTBEAT_S:
                        yield ": waiting\n\n"
                        beat = time.monotonic()
                    await self._either(inbox.take(self._pause()))
                    await self._look()
                    if not await self._is_allowed():
                        yield CLOSED
                        return
        finally:
            self._door.streams -= 1

    async def _is_allowed(self) -> bool:
        now = time.monotonic()
        if now < self._checked_at + RECHECK_S:
            return True
        self._checked_at = now
        return await self._door.still_allows(self._request, "read", self._info.tenant)

    def _news(self) -> list[Stage]:
        news = [stage for stage in stages(self._info) if stage.number > self._last]
        if news:
            self._last = news[-1].number
        return news

    def _is_over(self) -> bool:
        now = time.monotonic()
        gone = self._away_since is not None and now > self._away_since + PATIENCE_S
        return self._info.ended or gone or now > self._ending or self._door.draining.is_set()

    def _pause(self) -> float:
        return min(LONGEST_PAUSE_S, max(PAUSE_S, self._door.streams / LOOKS_PER_S))

    async def _either(self, news: Any) -> None:
        """Waits for news, or until the door closes."""
        tasks = [asyncio.ensure_future(each) for each in (news, self._door.draining.wait())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _look(self) -> None:
        try:
            info = await self._door.client.ledger.read(self._info.id)
        except QueueUnavailable:
            self._away_since = self._away_since or time.monotonic()
            return
        self._away_since = None
        if info is None:  # forgotten meanwhile: there is nothing to come
            self._ending = time.monotonic()
        else:
            self._info = info
