"""Jobs a second that one core of a door takes, and one core of the Python client."""

import http.client
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

import psutil

from benchmarks.clients import asked, per_s
from benchmarks.door import Door, Measured, running
from blipq import CaptionRequest, Client

ONE_BY_ONE, MANY, LINES = 2_000, 20_000, 10_000
ROUNDS = 3
#: Connections that are kept open, each with one request at a time.
CONNECTIONS = 4
OPTIONS = {"max_open_jobs": "1000000"}


def rates() -> dict[str, float]:
    """Jobs a second of both: medians of rounds in turn, and the door's share of the client's."""
    few, many = list(map(asked, range(ONE_BY_ONE))), list(map(asked, range(MANY)))
    bodies, lines = list(map(_body, few)), list(map(_body, many))  # as the client's are made ahead
    with running(**OPTIONS) as measured, pinned(measured), Client(measured.settings) as client:
        client.submit(few[0])
        post(measured, bodies[:20], 1)
        rounds = [
            {
                "client_per_s": per_s(ONE_BY_ONE, lambda: [client.submit(each) for each in few]),
                "door_one_connection_per_s": per_s(ONE_BY_ONE, lambda: post(measured, bodies, 1)),
                "door_per_s": per_s(ONE_BY_ONE, lambda: post(measured, bodies, CONNECTIONS)),
                "client_many_per_s": per_s(MANY, lambda: client.submit_many(many)),
                "door_batches_per_s": per_s(MANY, lambda: post_batches(measured, lines)),
            }
            for _ in range(ROUNDS)
        ]
        found = {name: median(each[name] for each in rounds) for name in rounds[0]}
    found["single_ratio"] = found["door_per_s"] / found["client_per_s"]
    found["batch_ratio"] = found["door_batches_per_s"] / found["client_many_per_s"]
    return found


@contextmanager
def pinned(measured: Measured) -> Iterator[None]:
    """Gives the door one core, and this process another one."""
    cores = sorted(os.sched_getaffinity(0))
    psutil.Process(measured.service.pid).cpu_affinity([cores[0]])
    os.sched_setaffinity(0, {cores[-1]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, set(cores))


def post(door: Door, bodies: list[str], connections: int) -> None:
    """Posts jobs one by one on each of so many connections."""

    def send(part: list[str]) -> None:
        connection = http.client.HTTPConnection(*door.host, timeout=60)
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


def post_batches(door: Door, lines: list[str]) -> None:
    """Posts lines of jobs, LINES at a time."""
    with door.http() as http:
        for at in range(0, len(lines), LINES):
            batch = lines[at : at + LINES]
            answer = http.post(
                "/v1/batches",
                content="\n".join(batch),
                headers={"Content-Type": "application/x-ndjson"},
            )
            if answer.text.count('"id"') != len(batch):
                raise RuntimeError(answer.text[:500])
