"""How long a door works on each page of its console while Redis holds many jobs."""

import json
import re
import statistics
import time
from collections.abc import Iterator
from typing import Any

import httpx2

from benchmarks.door import Measured, running
from blipq import CaptionRequest, Client, VQARequest
from blipq.contract import ErrorCode, JobError, Options
from blipq.ledger.connection import connect
from blipq.ledger.worker import Claim, WorkerLedger
from blipq.submission import Submission

ROUNDS = 10
RESULT = '{"kind": "caption", "captions": [{"text": "a woman on a beach with a dog"}]}'
ANSWER = '{"kind": "vqa", "answers": [{"question": "what?", "text": "a dog"}]}'
ERROR = JobError(code=ErrorCode.IMAGE_UNAVAILABLE, message="S3 is away", retryable=True)
#: Of a hundred jobs: so many wait, and so many are dead letters; the others have succeeded.
WAIT, DEAD = 10, 1
CHUNK = 10_000
OPTIONS = {"max_open_jobs": "1000000", "known_models": "default,large"}


def pages(jobs: int) -> dict[str, Any]:
    """Milliseconds on each page: the median, and the longest."""
    with running(**OPTIONS) as measured:
        ids = _fill(measured, jobs)
        with measured.http() as http:
            found = {name: _page(measured, http, path) for name, path in _paths(ids, http)}
            found["count of a bulk action"] = _count(measured, http)
    return {"jobs": jobs, "pages": found}


def _paths(ids: list[str], http: httpx2.Client) -> Iterator[tuple[str, str]]:
    older = re.search(r'href="(jobs\?[^"]*cursor=[^"]*)"', http.get("/console/jobs").text)
    assert older is not None
    yield "Overview", ""
    yield "Jobs", "jobs"
    yield "Jobs, the next page", older[1].replace("&amp;", "&")
    yield "Jobs, by status", "jobs?status=failed"
    yield "Jobs, by status, kind and model", "jobs?status=succeeded&kind=vqa&model=large"
    yield "Jobs, by metadata that some have", "jobs?name=campaign&value=7"
    yield "Jobs, by metadata that none has", "jobs?name=campaign&value=none"
    yield "a job", f"job?id={ids[len(ids) // 2]}"
    yield "Queues", "queues"
    yield "Workers", "workers"
    yield "Dead letters", "dead"
    yield "Webhooks", "webhooks"
    yield "Log", "log"
    yield "Try it", "try"


def _fill(measured: Measured, jobs: int) -> list[str]:
    """Jobs of two kinds and models, of which most have succeeded; their ids."""
    with Client(measured.settings) as client, connect(measured.settings) as raw:
        ledger = WorkerLedger(raw, measured.settings)
        ids: list[str] = []
        for at in range(0, jobs, CHUNK):
            many = [_submission(n) for n in range(at, min(at + CHUNK, jobs))]
            ids += [job.id for job in client.submit_many(many)]
        for n, id in enumerate(ids):
            if n % 100 >= WAIT:
                _end(ledger, id, n)
    return ids


def _submission(n: int) -> Submission:
    uri = f"s3://photos-of-the-shop/2026/{n}.jpg"
    fields: dict[str, Any] = {"image": uri}
    request = (
        CaptionRequest.model_validate(fields)
        if n % 3
        else VQARequest.model_validate({**fields, "questions": ["what?"]})
    )
    options = {"model": "large" if n % 2 else "default", "metadata": {"campaign": str(n % 500)}}
    return Submission(request, Options.model_validate(options))


def _end(ledger: WorkerLedger, id: str, n: int) -> None:
    claim = ledger.claim(id, "benchmark")
    assert isinstance(claim, Claim)
    if n % 100 < WAIT + DEAD:
        ledger.fail(claim, ERROR.model_dump_json(), "{}", dead=True)
    else:
        ledger.succeed(claim, RESULT if n % 3 else ANSWER, '{"queue_ms": 12.5}')


def _page(measured: Measured, http: httpx2.Client, path: str) -> dict[str, float]:
    ids = []
    for n in range(ROUNDS):
        ids.append(f"page-{time.monotonic_ns()}-{n}")
        answer = http.get(f"/console/{path}", headers={"X-Request-ID": ids[-1]})
        if answer.status_code != 200:
            raise RuntimeError(f"{path}: {answer.text[:500]}")
    return _times(measured, ids)


def _count(measured: Measured, http: httpx2.Client) -> dict[str, float]:
    """The dry run of a change of the jobs that failed."""
    token = re.search(r'name="form_token" value="(\w+)"', http.get("/console/try").text)
    assert token is not None
    ids = []
    for n in range(ROUNDS):
        ids.append(f"count-{time.monotonic_ns()}-{n}")
        fields = {"form_token": token[1], "action": "retry", "status": "failed"}
        answer = http.post("/console/select", data=fields, headers={"X-Request-ID": ids[-1]})
        if answer.status_code != 200:
            raise RuntimeError(answer.text[:500])
    return _times(measured, ids)


def _times(measured: Measured, ids: list[str]) -> dict[str, float]:
    """What the door's log of requests says of these."""
    assert measured.service.log is not None
    time.sleep(0.2)  # a line is written behind its answer
    wanted, found = set(ids), []
    for line in measured.service.log.read_text().splitlines():
        if line.startswith("{") and (told := json.loads(line)).get("request_id") in wanted:
            found.append(float(told["ms"]))
    if len(found) != len(ids):
        raise RuntimeError(f"{len(found)} of {len(ids)} requests are in the log")
    return {"median_ms": statistics.median(found), "max_ms": max(found)}
