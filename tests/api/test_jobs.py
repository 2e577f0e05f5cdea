"""A job's life through the door: a real server, and the ledger in the worker's place."""

import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import httpx2
import numpy as np
import pytest
import redis

from api.conftest import CAPTION, RESULT, DoorProcess, Start
from blipq import Client, InvalidRequest, Settings
from blipq.contract import ErrorCode, JobError, split_s3_uri
from blipq.index.store import Entry, Indexes, Space
from blipq.ledger.worker import Claim, WorkerLedger
from blipq.local.sample import red_square
from blipq.local.stack import free_port, redis_command
from blipq.local.supervisor import Service
from blipq.s3.storage import Storage
from blipq_api.server import bound
from conftest import wait_until

FAILURE = JobError(code=ErrorCode.IMAGE_NOT_FOUND, message="no such object").model_dump_json()


def claim(ledger: WorkerLedger, id: str) -> Claim:
    claimed = ledger.claim(id, "w1")
    assert isinstance(claimed, Claim)
    return claimed


def finish(ledger: WorkerLedger, id: str) -> None:
    assert ledger.succeed(claim(ledger, id), RESULT, "{}")


def retried(ledger: WorkerLedger, held: Claim) -> None:
    """Gives a job back for a retry that is due at once."""
    error = JobError(code=ErrorCode.IMAGE_UNAVAILABLE, message="S3 is away")
    assert ledger.retry(held, 0.001, error.model_dump_json())
    time.sleep(0.4)
    ledger.reconcile()


def submitted(http: httpx2.Client, body: Any = CAPTION, **headers: str) -> str:
    answer = http.post("/v1/jobs", json=body, headers=_dashed(headers))
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def _dashed(headers: dict[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in headers.items()}


def code_of(answer: httpx2.Response) -> tuple[int, str]:
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["status"] == answer.status_code
    assert problem["request_id"] == answer.headers["x-request-id"]
    return answer.status_code, problem["code"]


def test_a_job_is_submitted_read_and_its_result_fetched(
    http: httpx2.Client, ledger: WorkerLedger
) -> None:
    answer = http.post("/v1/jobs", json={**CAPTION, "options": {"metadata": {"order": "42"}}})
    told = answer.json()
    assert answer.status_code == 202
    assert answer.headers["location"] == told["status_url"] == f"/v1/jobs/{told['id']}"
    read = http.get(told["status_url"])
    assert (read.status_code, read.json()["status"]) == (202, "queued")
    assert http.get(told["result_url"]).status_code == 202
    finish(ledger, told["id"])
    read = http.get(told["status_url"])
    assert (read.status_code, read.json()["status"]) == (200, "succeeded")
    assert read.json()["metadata"] == {"order": "42"}
    assert http.get(told["result_url"]).json() == json.loads(RESULT)


def test_a_result_that_is_in_s3_alone_is_read_there(
    http: httpx2.Client, client: Client, ledger: WorkerLedger
) -> None:
    uri = f"s3://{client.settings.inbox_bucket}/results/1.json"
    client.storage.put(uri, RESULT.encode(), content_type="application/json")
    id = submitted(http)
    assert ledger.succeed(claim(ledger, id), RESULT, "{}", result_uri=uri)
    assert http.get(f"/v1/jobs/{id}").json()["result_uri"] == uri
    assert http.get(f"/v1/jobs/{id}/result").json() == json.loads(RESULT)
    client.storage.delete(uri)
    assert code_of(http.get(f"/v1/jobs/{id}/result")) == (404, "job_not_found")


def test_each_of_a_thousand_jobs_is_readable_at_once(http: httpx2.Client) -> None:
    for _ in range(1000):
        assert http.get(f"/v1/jobs/{submitted(http)}").status_code == 202


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({**CAPTION, "imgae": "s3://a/b"}, "imgae"),
        ({**CAPTION, "options": {"prio": "high"}}, "options.prio"),
        ({**CAPTION, "options": []}, "options"),
        ({**CAPTION, "options": "low"}, "options"),
        ({"kind": "draw", "image": "s3://photos/cat.jpg"}, "kind"),
        ({"image": "s3://photos/cat.jpg"}, "kind"),
        ({"kind": "caption", "image": "/etc/passwd"}, "image"),
        ({"kind": "caption", "image": "https://example.org:8443/cat.jpg"}, "image"),
        ({**CAPTION, "options": {"model": "unheard-of"}}, "unheard-of"),
        ([CAPTION], "request"),
        ("caption", "request"),
    ],
)
def test_a_wrong_field_is_named_and_nothing_is_recorded(
    http: httpx2.Client, raw_redis: "redis.Redis", body: Any, named: str
) -> None:
    answer = http.post("/v1/jobs", json=body)
    assert code_of(answer) in ((422, "invalid_request"), (422, "unknown_model"))
    assert named in answer.json()["detail"]
    assert not raw_redis.exists("blipq:open")


@pytest.mark.parametrize(
    ("content", "type", "expected"),
    [
        (b"{", "application/json", (400, "invalid_json")),
        (b'{"kind": NaN}', "application/json", (400, "invalid_json")),
        (b'{"kind": "\\ud800"}', "application/json", (400, "invalid_json")),
        (b"[" * 100_000, "application/json", (400, "invalid_json")),
        (b"\xff", "application/json", (400, "invalid_json")),
        (b"{}", "text/plain", (415, "unsupported_media_type")),
        (b"x" * (8 * 2**20 + 1), "application/json", (413, "too_large")),
    ],
)
def test_a_body_that_is_no_json_gets_a_code(
    http: httpx2.Client, content: bytes, type: str, expected: tuple[int, str]
) -> None:
    answer = http.post("/v1/jobs", content=content, headers={"Content-Type": type})
    assert code_of(answer) == expected


def test_a_body_without_a_length_is_cut_off_at_the_same_size(http: httpx2.Client) -> None:
    parts = (b"x" * 2**20 for _ in range(9))
    answer = http.post("/v1/jobs", content=parts, headers={"Content-Type": "application/json"})
    assert code_of(answer) == (413, "too_large")


def test_a_key_gives_the_same_job_and_another_body_is_a_conflict(http: httpx2.Client) -> None:
    first = submitted(http, Idempotency_Key="order-42")
    headers = {"Idempotency-Key": "order-42"}
    assert http.post("/v1/jobs", json=CAPTION, headers=headers).json()["id"] == first
    other = {**CAPTION, "prompt": "a photo of"}
    answer = http.post("/v1/jobs", json=other, headers=headers)
    assert code_of(answer) == (409, "idempotency_conflict")
    body = {**CAPTION, "options": {"idempotency_key": "order-43"}}
    assert code_of(http.post("/v1/jobs", json=body, headers=headers)) == (422, "invalid_request")


def test_an_id_of_the_callers_is_one_job(http: httpx2.Client) -> None:
    for _ in range(2):
        answer = http.put("/v1/jobs/order-42-caption", json=CAPTION)
        assert (answer.status_code, answer.json()["id"]) == (202, "order-42-caption")
    other = http.put("/v1/jobs/order-42-caption", json={**CAPTION, "prompt": "a"})
    assert code_of(other) == (409, "idempotency_conflict")
    assert code_of(http.put("/v1/jobs/%20", json=CAPTION)) == (422, "invalid_request")


@pytest.mark.parametrize("how", [{"params": {"wait": "30"}}, {"headers": {"Prefer": "wait=30"}}])
def test_a_wait_ends_with_the_job(
    http: httpx2.Client, ledger: WorkerLedger, how: dict[str, Any]
) -> None:
    id = submitted(http)
    later = threading.Timer(0.5, finish, (ledger, id))
    later.start()
    answer = http.get(f"/v1/jobs/{id}", **how)
    later.join()
    assert (answer.status_code, answer.json()["status"]) == (200, "succeeded")


def test_a_wait_for_a_job_that_goes_on_ends_in_time(http: httpx2.Client) -> None:
    answer = http.post("/v1/jobs", json=CAPTION, params={"wait": "1"})
    assert (answer.status_code, answer.json()["status"]) == (202, "queued")
    assert code_of(http.get("/v1/jobs/job_1", params={"wait": "30"})) == (404, "job_not_found")
    assert code_of(http.get("/v1/jobs/job_1", params={"wait": "-1"})) == (422, "invalid_request")


def test_a_job_of_a_python_client_is_waited_for_as_well(
    http: httpx2.Client, client: Client, ledger: WorkerLedger
) -> None:
    job = client.caption("s3://photos/cat.jpg")
    later = threading.Timer(0.5, finish, (ledger, job.id))
    later.start()
    assert http.get(f"/v1/jobs/{job.id}?wait=30").json()["status"] == "succeeded"
    later.join()


def test_a_cancelled_job_stays_cancelled_and_can_be_forgotten(http: httpx2.Client) -> None:
    id = submitted(http)
    assert code_of(http.post(f"/v1/jobs/{id}/forget")) == (409, "job_open")
    assert http.post(f"/v1/jobs/{id}/cancel").json()["status"] == "cancelled"
    assert http.delete(f"/v1/jobs/{id}").json()["status"] == "cancelled"
    assert code_of(http.get(f"/v1/jobs/{id}/result")) == (409, "job_cancelled")
    assert http.post(f"/v1/jobs/{id}/forget").json()["jobs"] == [id]
    assert code_of(http.get(f"/v1/jobs/{id}")) == (404, "job_not_found")
    assert code_of(http.post(f"/v1/jobs/{id}/cancel")) == (404, "job_not_found")


def test_a_failed_job_says_why(http: httpx2.Client, ledger: WorkerLedger) -> None:
    id = submitted(http)
    assert ledger.fail(claim(ledger, id), FAILURE, "{}")
    answer = http.get(f"/v1/jobs/{id}/result")
    assert code_of(answer) == (409, "job_failed")
    assert answer.json()["error_code"] == "image_not_found"


def test_whatever_ended_without_a_result_is_tried_again_and_nothing_else(
    http: httpx2.Client, ledger: WorkerLedger, raw_redis: "redis.Redis"
) -> None:
    failed, dead, cancelled, done, open = (submitted(http) for _ in range(5))
    assert ledger.fail(claim(ledger, failed), FAILURE, "{}")
    assert ledger.fail(claim(ledger, dead), FAILURE, "{}", dead=True)
    http.delete(f"/v1/jobs/{cancelled}")
    finish(ledger, done)
    for id in (failed, dead, cancelled):
        again = http.post(f"/v1/jobs/{id}/retry")
        assert (again.status_code, again.json()["status"]) == (202, "queued")
    for id in (done, open):
        assert code_of(http.post(f"/v1/jobs/{id}/retry")) == (409, "not_retryable")
    assert raw_redis.llen("blipq.default.normal") == 5 + 3
    noted = http.get("/v1/actions").json()["actions"]
    assert [(each["name"], each["via"], each["target"]) for each in noted[:3]] == [
        ("local", "api", id) for id in (cancelled, dead, failed)
    ]
    assert {each["action"] for each in noted[:3]} == {"retry"}


def test_forgetting_erases_what_a_job_left_elsewhere_and_says_what_it_left(
    http: httpx2.Client, client: Client, ledger: WorkerLedger, apart: Settings
) -> None:
    storage = Storage(apart)
    image = http.post(
        "/v1/uploads", content=red_square(), headers={"Content-Type": "image/png"}
    ).json()
    output = f"s3://{apart.inbox_bucket}/outputs/1.json"
    options = {"output": output}
    id = submitted(http, {**CAPTION, "image": image["uri"], "options": options})
    storage.put(output, RESULT.encode(), content_type="application/json")
    finish(ledger, id)
    kept = submitted(http, {**CAPTION, "options": options})
    assert ledger.fail(claim(ledger, kept), FAILURE, "{}", dead=True)
    told = http.post(f"/v1/jobs/{id}/forget").json()
    assert (told["jobs"], told["left"]) == ([id], [])
    assert sorted(told["objects"]) == sorted([image["uri"], output])
    for uri in told["objects"]:
        assert storage.head(*split_s3_uri(uri)) is None
    # It failed, so that what is there may be another's. A dead letter goes as well.
    told = http.post(f"/v1/jobs/{kept}/forget").json()
    assert (told["jobs"], told["objects"]) == ([kept], [])
    assert told["left"] == [f"{output}: job {kept} may have written it"]
    assert code_of(http.get(f"/v1/jobs/{kept}")) == (404, "job_not_found")


def test_forgetting_takes_an_image_out_of_its_search_index(
    http: httpx2.Client, ledger: WorkerLedger, apart: Settings
) -> None:
    image = CAPTION["image"]
    index = Indexes(apart).open_or_create("forgotten", Space("demo", "1"))
    vectors = np.eye(32, 256, dtype=np.float16)
    index.upsert([Entry(name, image, "", vectors) for name in ("one", "two")])
    asked = {"kind": "embed", "image": image, "index": {"name": "forgotten", "id": "one"}}
    id = submitted(http, asked)
    embedded = json.dumps({"kind": "embed", "arrays": {}, "indexed": "forgotten"})
    assert ledger.succeed(claim(ledger, id), embedded, "{}")
    told = http.post(f"/v1/jobs/{id}/forget").json()
    assert (told["entries"], told["left"]) == (1, [])
    assert index.info().images == 1


def test_lists_filter_and_go_on_behind_a_cursor(http: httpx2.Client, ledger: WorkerLedger) -> None:
    ids = [
        submitted(http, {**CAPTION, "options": {"metadata": {"n": str(n % 2)}}}) for n in range(7)
    ]
    vqa = submitted(http, {**CAPTION, "kind": "vqa", "questions": "what?"})
    finish(ledger, ids[0])
    seen: list[str] = []
    cursor: dict[str, str] = {}
    while True:
        page = http.get("/v1/jobs", params={"limit": "3", **cursor}).json()
        seen += [job["id"] for job in page["jobs"]]
        if "next_cursor" not in page:
            break
        cursor = {"cursor": page["next_cursor"]}
    assert seen == [vqa, *reversed(ids)]

    def listed(**query: str) -> list[str]:
        return [job["id"] for job in http.get("/v1/jobs", params=query).json()["jobs"]]

    assert listed(kind="vqa") == [vqa]
    assert listed(status="succeeded") == [ids[0]]
    assert listed(**{"metadata.n": "1"}) == [ids[5], ids[3], ids[1]]
    assert listed(model="other") == []
    assert listed(until="2020-01-01T00:00:00") == listed(since="2200-01-01T00:00:00Z") == []
    assert listed(since="2020-01-01T00:00:00+02:00", kind="vqa", tenant="") == [vqa]
    assert listed(tenant="shop") == []
    wrong_times = ({"since": "now"}, {"until": "0001-01-01"}, {"since": "9999-12-31"})
    wrong_queries = ({"statsu": "queued"}, {"status": "done"}, {"limit": "0"}, {"cursor": "!"})
    for wrong in (*wrong_times, *wrong_queries):
        assert code_of(http.get("/v1/jobs", params=wrong)) == (422, "invalid_request")


def test_models_queues_and_health_are_shown(http: httpx2.Client) -> None:
    submitted(http, {**CAPTION, "options": {"model": "m"}})
    assert http.get("/v1/models").json()["models"] == [
        {"name": "m", "live_workers": 0, "waiting": 1}
    ]
    told = http.get("/v1/queues").json()
    assert (told["open"], told["queues"][0]["queue"]) == (1, "blipq.m.normal")
    assert http.get("/v1/workers").json() == {"workers": []}
    assert http.get("/health").json() == {"status": "ok"}
    assert code_of(http.get("/v1/nothing")) == (404, "not_found")
    assert "/openapi.json" in http.get("/v1/nothing").json()["detail"]
    assert code_of(http.patch("/v1/jobs")) == (405, "method_not_allowed")
    assert "the header Allow" in http.patch("/v1/jobs").json()["detail"]
    assert "accepted: status, kind" in http.get("/v1/jobs", params={"foo": "1"}).json()["detail"]


def test_webhook_events_are_listed_without_tokens_and_sent_again(
    http: httpx2.Client, ledger: WorkerLedger
) -> None:
    hook = {"url": "https://example.org/hook?token=sesame"}
    id = submitted(http, {**CAPTION, "options": {"webhook": hook}})
    finish(ledger, id)
    (event,) = http.get("/v1/webhooks").json()["events"]
    assert (event["job_id"], event["url"]) == (id, "https://example.org/hook?token=***")
    again = http.post(f"/v1/webhooks/{event['event']}/replay")
    assert (again.status_code, again.json()) == (202, {"events": [event["event"]]})
    assert http.post(f"/v1/webhooks/{id}/replay").status_code == 202
    assert code_of(http.post("/v1/webhooks/nothing/replay")) == (404, "event_not_found")
    assert code_of(http.get("/v1/webhooks?dead=1")) == (422, "invalid_request")


# -- stages --


def read_stages(http: httpx2.Client, id: str, last: str | None = None) -> list[dict[str, str]]:
    """All events of a stream, to its end."""
    headers = {} if last is None else {"Last-Event-ID": last}
    with http.stream("GET", f"/v1/jobs/{id}/events", headers=headers) as answer:
        return list(parsed(answer))


def parsed(answer: httpx2.Response) -> Any:
    event: dict[str, str] = {}
    for line in answer.iter_lines():
        name, _, value = line.partition(": ")
        if line:
            event[name] = value
        elif "id" in event:
            yield event
            event = {}
        else:
            event = {}


def test_stages_are_told_as_they_come(http: httpx2.Client, ledger: WorkerLedger) -> None:
    id = submitted(http)
    found: list[dict[str, str]] = []

    def listen() -> None:
        found.extend(read_stages(http, id))

    listening = threading.Thread(target=listen)
    listening.start()
    time.sleep(0.5)
    held = claim(ledger, id)
    time.sleep(0.4)
    retried(ledger, held)
    finish(ledger, id)
    listening.join(timeout=30)
    assert [each["event"] for each in found] == [
        "queued",
        "running",
        "retrying",
        "running",
        "succeeded",
    ]
    assert [int(each["id"]) for each in found] == [0, 3, 4, 7, 9]
    assert json.loads(found[-1]["data"])["result"] == json.loads(RESULT) | {
        "captions": [{"text": "a cat"}]
    }


def test_a_stream_that_was_cut_goes_on_without_loss_or_repeat(
    http: httpx2.Client, door: DoorProcess, ledger: WorkerLedger
) -> None:
    id = submitted(http)
    seen: list[str] = []
    last: str | None = None

    def work() -> None:
        for _ in range(3):
            held = claim(ledger, id)
            time.sleep(0.4)
            retried(ledger, held)
        finish(ledger, id)

    working = threading.Thread(target=work)
    working.start()
    while last is None or not seen[-1].startswith("succeeded"):
        headers = {} if last is None else {"Last-Event-ID": last}
        with (
            door.http() as cut,
            cut.stream("GET", f"/v1/jobs/{id}/events", headers=headers) as answer,
        ):
            for event in parsed(answer):
                last = event["id"]
                seen.append(f"{event['event']} {last}")
                break  # the connection is closed in the midst
    working.join()
    assert len(seen) == len(set(seen))
    assert seen == [
        *("queued 0", "running 3", "retrying 4", "running 7", "retrying 8"),
        *("running 11", "retrying 12", "running 15", "succeeded 17"),
    ]
    assert http.get(f"/v1/jobs/{id}/events", headers={"Last-Event-ID": "17"}).status_code == 204
    wrong = http.get(f"/v1/jobs/{id}/events", headers={"Last-Event-ID": "x"})
    assert code_of(wrong) == (422, "invalid_request")
    assert code_of(http.get("/v1/jobs/job_1/events")) == (404, "job_not_found")


def test_a_stream_that_is_cut_anywhere_twenty_times_tells_each_stage_once(
    start: Start, ledger: WorkerLedger
) -> None:
    """Cut after so many bytes, within an event, too: only whole ones count, as in browsers."""
    door = start()
    with door.http() as http:
        id = submitted(http)
    enough = threading.Event()
    working = threading.Thread(target=_several_attempts, args=(ledger, id, 6, enough))
    working.start()
    random = Random(26)
    seen: list[str] = []
    cuts, last = 0, ""
    host, _, port = door.url.removeprefix("http://").partition(":")
    while not seen or not seen[-1].startswith("succeeded"):
        with socket.create_connection((host, int(port)), 30) as connection:
            resumed = f"Last-Event-ID: {last}\r\n" if last else ""
            head = f"GET /v1/jobs/{id}/events HTTP/1.0\r\nHost: localhost\r\n{resumed}\r\n"
            connection.sendall(head.encode())
            most = 2**20 if cuts >= 20 else random.choice((1, 300, 700, 900, 1100, 1500))
            for event in _whole_events(connection, most):
                last = event["id"]
                seen.append(f"{event['event']} {last}")
        cuts += 1
        if cuts == 20:
            enough.set()
        time.sleep(random.uniform(0, 0.2))
    working.join()
    assert cuts > 20, "and then to the end"
    assert len(seen) == len(set(seen)), seen
    assert [each.split()[0] for each in seen] == [
        "queued",
        *["running", "retrying"] * 6,
        *("running", "succeeded"),
    ]


def _several_attempts(ledger: WorkerLedger, id: str, count: int, enough: threading.Event) -> None:
    for _ in range(count):
        time.sleep(0.5)
        held = claim(ledger, id)
        time.sleep(0.4)
        retried(ledger, held)
    assert enough.wait(60)
    finish(ledger, id)


def _whole_events(connection: socket.socket, most: int) -> Iterator[dict[str, str]]:
    """The events of a stream that is cut after so many bytes, or where none comes for a while."""
    connection.settimeout(0.2)
    data = b""
    with suppress(TimeoutError):
        while len(data) < most and (part := connection.recv(most - len(data))):
            data += part
    body = data.partition(b"\r\n\r\n")[2].decode(errors="ignore")
    for block in body.split("\n\n")[:-1]:
        fields = dict(line.partition(": ")[::2] for line in block.splitlines())
        if "id" in fields:
            yield fields


# -- the end --


def test_an_answer_in_two_parts_does_not_wait_for_an_acknowledgement() -> None:
    with bound("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        answering, _ = listening.accept()
        with answering:
            assert answering.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_port_that_is_taken_is_named() -> None:
    with bound("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        told = f"cannot listen on 127.0.0.1 port {port}: Address already in use: give another"
        with pytest.raises(InvalidRequest, match=told):
            bound("127.0.0.1", port)


def test_a_drain_answers_whoever_waits_and_ends_with_0(start: Start) -> None:
    door = start()
    with door.http() as http:
        id = submitted(http)
        answers: list[httpx2.Response] = []
        stages: list[Any] = []

        def wait() -> None:
            with door.http() as own:
                answers.append(own.get(f"/v1/jobs/{id}?wait=60"))

        def listen() -> None:
            with door.http() as own:
                stages.extend(read_stages(own, id))

        waiting = [threading.Thread(target=each) for each in (wait, listen)]
        for each in waiting:
            each.start()
        time.sleep(1)
        door.service.stop(timeout=30)
        for each in waiting:
            each.join(timeout=10)
    assert (answers[0].status_code, answers[0].json()["status"]) == (202, "queued")
    assert [each["event"] for each in stages] == ["queued"]
    assert door.service.exit_code == 0


def test_redis_away_is_503_with_a_time_and_then_all_is_right_again(
    start: Start, own_redis: Any
) -> None:
    door = start(redis_url=own_redis.redis_url, timeout_s="0.5")
    from blipq.ledger.connection import connect

    with door.http() as http:
        id = submitted(http)
        with connect(own_redis) as raw:
            raw.execute_command("CLIENT", "PAUSE", 3000)
        answer = http.post("/v1/jobs", json=CAPTION)
        assert code_of(answer) == (503, "queue_unavailable")
        assert answer.headers["retry-after"] == "1"
        assert answer.json()["retryable"] is True
        assert code_of(http.get("/health")) == (503, "queue_unavailable")
        wait_until(lambda: http.get(f"/v1/jobs/{id}").status_code == 202, "Redis")
        submitted(http)


def test_redis_killed_is_503_with_a_time_and_what_was_recorded_is_there_again(
    start: Start, tmp_path: Path
) -> None:
    port = str(free_port())
    durable = ("--appendonly", "yes", "--appendfsync", "always", "--save", "")
    command = [redis_command(), "--port", port, "--bind", "127.0.0.1", "--dir", str(tmp_path)]
    server = Service("redis", [*command, *durable], log=tmp_path / "redis.log")
    server.start()
    door = start(redis_url=f"redis://127.0.0.1:{port}/0", timeout_s="0.5")
    try:
        with door.http() as http:
            wait_until(lambda: http.get("/health").status_code == 200, "Redis")
            ids = [submitted(http) for _ in range(5)]
            server.signal(signal.SIGKILL)
            server.wait(10)
            for answer in (http.post("/v1/jobs", json=CAPTION), http.get(f"/v1/jobs/{ids[0]}")):
                assert code_of(answer) == (503, "queue_unavailable")
                assert int(answer.headers["retry-after"]) >= 1
            server.start()
            wait_until(lambda: http.get("/health").status_code == 200, "Redis again")
            assert {http.get(f"/v1/jobs/{id}").status_code for id in ids} == {202}
            assert http.get(f"/v1/jobs/{submitted(http)}").status_code == 202
    finally:
        server.stop()


TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_a_traceparent_goes_from_a_request_into_the_records_of_its_jobs(
    http: httpx2.Client, ledger: WorkerLedger
) -> None:
    alone = submitted(http, traceparent=TRACE)
    put = http.put("/v1/jobs/order-4711", json=CAPTION, headers={"traceparent": TRACE}).json()["id"]
    lines = "\n".join([json.dumps(CAPTION)] * 2)
    headers = {"traceparent": TRACE, "content-type": "application/x-ndjson"}
    answers = http.post("/v1/batches", content=lines, headers=headers).text.splitlines()
    batch = [json.loads(each)["id"] for each in answers]
    found = [claim(ledger, id).traceparent for id in (alone, put, *batch)]
    assert found == [TRACE] * 4


@pytest.mark.parametrize("header", ["", "nonsense", TRACE.replace("00-", "ff-", 1), "x" * 5000])
def test_a_traceparent_that_is_none_is_no_fault_of_the_job(
    http: httpx2.Client, ledger: WorkerLedger, header: str
) -> None:
    id = submitted(http, traceparent=header)
    assert claim(ledger, id).traceparent == ""
