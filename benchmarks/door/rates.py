"""Jobs a second that one core of a door takes, and one core of the Python client."""

import http.client
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil

from benchmarks.clients import asked, per_s
from benchmarks.door import Measured, running
from blipq import CaptionRequest, Client

ONE_BY_ONE, MANY, LINES = 2_000, 20_000, 10_000
#: Connections that are kept open, each with one request at a time.
CONNECTIONS = 4
OPTIONS = {"max_open_jobs": "1000000"}


def rates() -> dict[str, float]:
    """Jobs a second of both, in turn, and what share of the client's rates the door has."""
    few, many = list(map(asked, range(ONE_BY_ONE))), list(map(asked, range(MANY)))
    with running(**OPTIONS) as measured, pinned(measured), Client(measured.settings) as client:
        client.submit(few[0])
        _post(measured, few[:20], 1)
        found = {
            "client_per_s": per_s(ONE_BY_ONE, lambda: [client.submit(each) for each in few]),
            "door_one_connection_per_s": per_s(ONE_BY_ONE, lambda: _post(measured, few, 1)),
            "door_per_s": per_s(ONE_BY_ONE, lambda: _post(measured, few, CONNECTIONS)),
            "client_many_per_s": per_s(MANY, lambda: client.submit_many(many)),
            "door_batches_per_s": per_s(MANY, lambda: _batches(measured, many)),
        }
    found["single_ratio"] = found["door_per_s"] / found["client_per_s"]
    found["batch_ratio"] = found["door_batches_per_s"] / found["client_many_per_s"]
    return found


@contextmanager
def pinned(measured: Measured) -> Iterator[None]:
    """Gives the door one core, and this process another one."""
    cores = sorted(os.sched_getaffinity(0))
    psutil.Process(measured.door.pid).cpu_affinity([cores[0]])
    os.sched_setaffinity(0, {cores[-1]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, set(cores))


def _post(measured: Measured, requests: list[CaptionRequest], connections: int) -> None:
    bodies = list(map(_body, requests))

    def send(part: list[str]) -> None:
        connection = http.client.HTTPConnection(*measured.host, timeout=60)
        for body in part:
            connection.request("POST", "/v1/jobs", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read()
            if answer.status != 202:
                raise RuntimeError(text)
        connection.close()

    _all([lambda part=bodies[n::connections]: send(part) for n in range(connections)])


def _body(request: CaptionRequest) -> str:
    assert request.image is not None
    return json.dumps({"kind": request.kind, "image": request.image.uri})


def _all(works: list[Callable[[], None]]) -> None:
    failed: list[BaseException] = []

    def run(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # shown by the thread that waits
            failed.append(error)

    threads = [threading.Thread(target=run, args=(each,)) for each in works]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    if failed:
        raise failed[0]


def _batches(measured: Measured, requests: list[CaptionRequest]) -> None:
    with measured.http() as http:
        for at in range(0, len(requests), LINES):
            lines = list(map(_body, requests[at : at + LINES]))
            answer = http.post(
                "/v1/batches",
                content="\n".join(lines),
                headers={"Content-Type": "application/x-ndjson"},
            )
            if answer.text.count('"id"') != len(lines):
                raise RuntimeError(answer.text[:500])
