"""Many jobs at once: a request a line, in a body or in an object, and an answer a line."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from starlette.requests import Request
from starlette.responses import Response

from blipq.bulk.manifest import LONGEST_LINE, S3Object
from blipq.contract import ImageRef
from blipq.errors import BlipqError, InvalidRequest, SubmitStopped
from blipq.ledger.codec import check_urls
from blipq.submission import Submission, checked
from blipq_api.access.keys import Caller
from blipq_api.door import Door, caller_of, door_of, json_of, media_type, read_body, read_json
from blipq_api.problems import Problem, problem_of
from blipq_api.routes.jobs import job_request_of

LINES = ("application/x-ndjson", "application/jsonl", "application/jsonlines")
MOST_LINES = 10_000
MOST_BYTES = 64 * 2**20
#: Lines that are checked and recorded before others get their turn.
CHUNK = 200
LONGEST_ID = 512

_Item = Submission | Problem


async def submit(request: Request) -> Response:
    """Records the job of each line; one that is refused does not hold up the others."""
    door, caller = door_of(request), caller_of(request)
    async with door.large_body():
        body = await _body(request, door, caller)
        lines = [(n, line) for n, line in enumerate(body.split(b"\n"), 1) if line.strip()]
        if len(lines) > MOST_LINES:
            raise Problem(413, "too_large", f"a batch has at most {MOST_LINES:,} lines")
        batch = _Batch(door, caller, request.headers.get("traceparent"))
        for at in range(0, len(lines), CHUNK):
            await batch.record(lines[at : at + CHUNK])
    if batch.away is not None and not batch.recorded:
        raise batch.away
    return Response("".join(batch.answers), media_type="application/x-ndjson")


async def _body(request: Request, door: Door, caller: Caller) -> bytes:
    kind = media_type(request)
    if kind in LINES:
        return await read_body(request, MOST_BYTES)
    if kind != "application/json":
        text = f"{LINES[0]}, or application/json with a manifest, is expected"
        raise Problem(415, "unsupported_media_type", text)
    body = await read_json(request)
    if not (isinstance(body, dict) and set(body) == {"manifest"}):
        raise InvalidRequest("request: an object with manifest, an s3:// URI, is expected")
    uri = checked(ImageRef, uri=body["manifest"])
    if not uri.in_s3:
        raise InvalidRequest("manifest: an s3:// URI is expected")
    caller.check_read(uri, "manifest", door.settings.inbox_bucket)
    return await door.store(lambda: _read(uri.uri, door))


def _read(uri: str, door: Door) -> bytes:
    found = S3Object(uri, door.client.storage)
    if found.size > MOST_BYTES:
        raise Problem(413, "too_large", f"{uri} is too large: the most is {MOST_BYTES:,} bytes")
    blocks: list[bytes] = []
    size = 0
    while block := found.read(size):
        size += len(block)
        blocks.append(block)
    return b"".join(blocks)


class _Batch:
    """The jobs of one batch. Once the queue is full or away, no further one is tried."""

    def __init__(self, door: Door, caller: Caller, traceparent: str | None) -> None:
        self._door = door
        self._caller = caller
        self._traceparent = traceparent
        self.answers: list[str] = []
        self.recorded = 0
        self.away: Problem | None = None

    async def record(self, lines: Sequence[tuple[int, bytes]]) -> None:
        """Records the jobs of these lines."""
        items = [
            (number, *await _checked(self._door, self._caller, line)) for number, line in lines
        ]
        submissions = [item for _, _, item in items if isinstance(item, Submission)]
        if self._traceparent is not None:
            submissions = [replace(each, traceparent=self._traceparent) for each in submissions]
        outcomes = iter(await self._submitted(submissions))
        for number, custom_id, item in items:
            outcome = item if isinstance(item, Problem) else next(outcomes)
            self.answers.append(_answer(number, custom_id, outcome))

    async def _submitted(self, submissions: list[Submission]) -> list[str | Problem]:
        """The id of each job, or why there is none."""
        answers: list[str | Problem] = []
        while len(answers) < len(submissions):
            if self.away is not None:
                return [*answers, *[self.away] * (len(submissions) - len(answers))]
            try:
                jobs: list[Any] = await self._door.client.submit_many(submissions[len(answers) :])
                answers += [job.id for job in jobs]
                self.recorded += len(jobs)
            except SubmitStopped as stopped:
                answers += [job.id for job in stopped.jobs]
                self.recorded += len(stopped.jobs)
                problem = problem_of(cast(BlipqError, stopped.__cause__))
                if stopped.retryable:
                    self.away = problem
                else:
                    answers.append(problem)
        return answers


async def _checked(door: Door, caller: Caller, line: bytes) -> tuple[str | None, _Item]:
    """A line as a single submit checks it, and its ``custom_id``."""
    custom_id = None
    try:
        if len(line) > LONGEST_LINE:
            raise Problem(413, "too_large", f"a line has at most {LONGEST_LINE:,} bytes")
        body = json_of(line)
        if isinstance(body, dict):
            custom_id = _custom_id(body.pop("custom_id", None))
        job_request, options = job_request_of(body)
        inbox = door.settings.inbox_bucket
        check_urls(job_request, options, door.settings)
        id = await door.client.ledger.make_id(options)
        return custom_id, caller.submission(job_request, options, id, inbox)
    except (BlipqError, Problem) as error:
        return custom_id, problem_of(error)


def _custom_id(value: Any) -> str | None:
    if value is not None and not (isinstance(value, str) and 0 < len(value) <= LONGEST_ID):
        raise InvalidRequest(f"custom_id: a text of 1 to {LONGEST_ID} characters is expected")
    return value


def _answer(number: int, custom_id: str | None, outcome: str | Problem) -> str:
    answer: dict[str, Any] = {"line": number}
    if custom_id is not None:
        answer["custom_id"] = custom_id
    if isinstance(outcome, str):
        answer["id"] = outcome
    else:
        answer["error"] = {
            "code": outcome.code,
            "detail": outcome.detail,
            "retryable": outcome.retry_after_s is not None,
        }
    return json.dumps(answer) + "\n"
