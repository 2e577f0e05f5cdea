"""Images and batches through the door: real S3, and real jobs of every kind."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from api.conftest import CAPTION, DoorProcess, Start, running, service_of
from api.test_jobs import code_of
from blipq import Settings
from blipq.local.sample import red_square
from blipq.local.stack import LocalStack
from blipq.s3.storage import Storage
from blipq_api.app import OPERATIONS
from blipq_api.reference import document
from conftest import ROOT

PICTURE = red_square()
DIGEST = hashlib.sha256(PICTURE).hexdigest()


def test_bytes_and_a_form_become_the_same_object(http: httpx2.Client, apart: Settings) -> None:
    png = {"Content-Type": "image/png"}
    plain = http.post("/v1/uploads", content=PICTURE, headers=png)
    form = http.post("/v1/uploads", files={"file": ("a.png", PICTURE, "image/png")})
    assert (plain.status_code, form.status_code) == (201, 201)
    uri = f"s3://{apart.inbox_bucket}/{DIGEST}"
    assert plain.json() == form.json() == {"uri": uri}
    body = Storage(apart).client.get_object(Bucket=apart.inbox_bucket, Key=DIGEST)["Body"]
    assert body.read() == PICTURE


def test_what_is_no_image_or_too_large_is_refused(http: httpx2.Client) -> None:
    text = http.post("/v1/uploads", content=b"x", headers={"Content-Type": "text/plain"})
    assert code_of(text) == (415, "unsupported_media_type")
    empty = http.post("/v1/uploads", content=b"", headers={"Content-Type": "image/png"})
    assert code_of(empty) == (422, "invalid_request")
    large = http.post(
        "/v1/uploads", content=bytes(64 * 2**20 + 1), headers={"Content-Type": "image/png"}
    )
    assert code_of(large) == (413, "too_large")
    form = http.post("/v1/uploads", files={"picture": ("a.png", PICTURE)})
    assert code_of(form) == (422, "invalid_request")
    broken = {"Content-Type": "multipart/form-data"}
    answer = http.post("/v1/uploads", content=b"--x", headers=broken)
    assert code_of(answer) == (422, "invalid_request")


def presigned(http: httpx2.Client, data: bytes, **changes: Any) -> dict[str, Any]:
    asked = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    answer = http.post("/v1/uploads", json=asked | changes)
    assert answer.status_code == 201, answer.text
    told: dict[str, Any] = answer.json()
    return told


def test_a_presigned_upload_takes_the_bytes_it_was_signed_for(
    http: httpx2.Client, apart: Settings
) -> None:
    told = presigned(http, PICTURE, content_type="image/png")
    put = httpx2.put(told["url"], content=PICTURE, headers=told["headers"], trust_env=False)
    assert put.status_code == 200, put.text
    assert told["uri"] == f"s3://{apart.inbox_bucket}/{DIGEST}.png"
    found = Storage(apart).head(apart.inbox_bucket, f"{DIGEST}.png")
    assert found is not None
    assert found["ContentLength"] == len(PICTURE)
    assert "X-Amz-Expires=900" in told["url"]


def test_a_presigned_upload_refuses_another_length_and_another_digest(
    http: httpx2.Client,
) -> None:
    told = presigned(http, b"one picture")
    longer = {**told["headers"], "Content-Length": "12"}
    put = httpx2.put(told["url"], content=b"one picture!", headers=longer, trust_env=False)
    assert put.status_code == 403
    other = {**told["headers"], "x-amz-checksum-sha256": "A" * 43 + "="}
    put = httpx2.put(told["url"], content=b"two picture", headers=other, trust_env=False)
    assert put.status_code == 403
    for wrong in ({"bytes": 0}, {"bytes": 2**30}, {"sha256": "x"}, {"content_type": "text/html"}):
        asked = {"sha256": DIGEST, "bytes": 1} | wrong
        assert code_of(http.post("/v1/uploads", json=asked)) == (422, "invalid_request")


def test_a_presigned_upload_goes_to_the_public_endpoint(start: Start) -> None:
    door = start(s3_public_endpoint_url="https://s3.example.org")
    with door.http() as http:
        assert presigned(http, PICTURE)["url"].startswith("https://s3.example.org/blipq-inbox/")


# -- batches --


def batch(http: httpx2.Client, *lines: Any) -> list[dict[str, Any]]:
    texts = [each if isinstance(each, str) else json.dumps(each) for each in lines]
    answer = http.post(
        "/v1/batches",
        content="\n".join(texts).encode(),
        headers={"Content-Type": "application/x-ndjson"},
    )
    assert answer.status_code == 200, answer.text
    return [json.loads(line) for line in answer.text.splitlines()]


def test_each_line_of_a_batch_is_checked_as_a_single_submit_is(http: httpx2.Client) -> None:
    key = {"idempotency_key": "batch-1"}
    answers = batch(
        http,
        {**CAPTION, "custom_id": "a"},
        {**CAPTION, "imgae": "x"},
        "",
        "{",
        {**CAPTION, "options": key},
        {**CAPTION, "options": key, "prompt": "another"},
        {**CAPTION, "options": {"model": "unheard-of"}},
        {**CAPTION, "custom_id": "b"},
    )
    assert [each["line"] for each in answers] == [1, 2, 4, 5, 6, 7, 8]
    codes = [each.get("error", {}).get("code") for each in answers]
    assert codes == [
        *(None, "invalid_request", "invalid_json", None),
        *("idempotency_conflict", "unknown_model", None),
    ]
    assert [each.get("custom_id") for each in answers][::6] == ["a", "b"]
    for each in answers:
        if "id" in each:
            assert http.get(f"/v1/jobs/{each['id']}").status_code == 202


def test_a_thousand_lines_are_a_thousand_jobs(http: httpx2.Client) -> None:
    answers = batch(http, *[{**CAPTION, "custom_id": str(n)} for n in range(1000)])
    assert len({each["id"] for each in answers}) == 1000
    assert http.get("/v1/queues").json()["open"] == 1000
    too_many = http.post(
        "/v1/batches",
        content=b"{}\n" * 10_001,
        headers={"Content-Type": "application/x-ndjson"},
    )
    assert code_of(too_many) == (413, "too_large")


def test_a_manifest_in_s3_is_read_and_one_that_is_not_there_is_named(
    http: httpx2.Client, apart: Settings
) -> None:
    uri = f"s3://{apart.inbox_bucket}/manifests/one.jsonl"
    lines = "".join(json.dumps(CAPTION) + "\n" for _ in range(3))
    Storage(apart).put(uri, lines.encode(), content_type="application/x-ndjson")
    answer = http.post("/v1/batches", json={"manifest": uri})
    assert answer.status_code == 200, answer.text
    assert len(answer.text.splitlines()) == 3
    gone = http.post("/v1/batches", json={"manifest": uri + "x"})
    assert code_of(gone) == (422, "invalid_request")
    for wrong in ({}, {"manifest": "/etc/passwd"}, {"manifest": 1}, {"manifest": uri, "x": 1}):
        assert code_of(http.post("/v1/batches", json=wrong)) == (422, "invalid_request")


# -- the whole way --


@pytest.fixture(scope="module")
def served(
    stack: LocalStack,
    settings: Settings,
    worker: object,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[DoorProcess]:
    """A door beside a real worker."""
    service = service_of(stack, settings, tmp_path_factory.mktemp("served") / "door.log")
    yield running(service)
    service.stop(timeout=30)


@pytest.mark.parametrize(
    "asked",
    [
        {"kind": "caption"},
        {"kind": "vqa", "questions": "what color?"},
        {"kind": "match", "texts": ["a red square", "a dog"]},
        {"kind": "embed"},
        {"kind": "describe", "questions": ["what color?"]},
        {"kind": "embed", "index": "door"},
    ],
    ids=lambda asked: "-".join(map(str, asked)),
)
def test_a_job_of_each_kind_comes_to_its_result(served: DoorProcess, asked: Any) -> None:
    with served.http() as http:
        uri = http.post(
            "/v1/uploads", content=PICTURE, headers={"Content-Type": "image/png"}
        ).json()["uri"]
        answer = http.post("/v1/jobs?wait=60", json={**asked, "image": uri})
        assert (answer.status_code, answer.json()["status"]) == (200, "succeeded")
        result = http.get(f"{answer.headers['location']}/result").json()
        assert result["kind"] == asked["kind"]


def test_a_search_finds_what_was_indexed(served: DoorProcess) -> None:
    with served.http() as http:
        uri = http.post(
            "/v1/uploads", content=PICTURE, headers={"Content-Type": "image/png"}
        ).json()["uri"]
        entry = {"kind": "embed", "image": uri, "index": {"name": "door-search", "id": "square"}}
        assert http.post("/v1/jobs?wait=60", json=entry).json()["status"] == "succeeded"
        asked = {"kind": "search", "index": "door-search", "text": "a red square"}
        found = http.post("/v1/jobs?wait=60", json=asked).json()
        assert [hit["id"] for hit in found["result"]["hits"]] == ["square"]


# -- the description --


def test_every_operation_is_described_and_its_references_lead_somewhere(
    http: httpx2.Client,
) -> None:
    told = http.get("/openapi.json").json()
    assert told == json.loads(json.dumps(document(OPERATIONS)))
    described = {
        (method.upper(), path) for path, methods in told["paths"].items() for method in methods
    }
    served = {
        (each.method, each.path.replace(":path", ""))
        for each in OPERATIONS
        if not each.path.startswith(("/docs", "/openapi"))
    }
    assert described == served
    text = json.dumps(told)
    for part in text.split('"$ref": "')[1:]:
        name = part.partition('"')[0].removeprefix("#/components/schemas/")
        assert name in told["components"]["schemas"]
    page = http.get("/docs")
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    assert "<script" not in page.text
    loaded = re.findall(r'(?:src|href)="([^"]*)"', page.text)
    assert sorted(loaded) == ["docs/style.css", "openapi.json"]
    assert http.get("/docs/style.css").headers["content-type"].startswith("text/css")


def test_the_checked_in_description_is_openapi(tmp_path: Path) -> None:
    from schemathesis import openapi

    schema = openapi.from_dict(json.loads(json.dumps(document(OPERATIONS))))
    assert len(list(schema.get_all_operations())) == len(OPERATIONS) - 3


# -- the examples --

#: How each is run, and the program that this needs.
EXAMPLES = {
    "jobs.sh": (["sh"], "curl"),
    "jobs.mjs": (["node"], "node"),
    "jobs.go": (["go", "run"], "go"),
}

#: Where Go is found: the `dev` extra brings it as a wheel, into the environment's own folder.
PROGRAMS = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_finishes_all_six_kinds(served: DoorProcess, tmp_path: Path, name: str) -> None:
    program, needed = EXAMPLES[name]
    if shutil.which(needed, path=PROGRAMS) is None:
        assert "CI" not in os.environ, f"CI needs {needed}"
        pytest.skip(f"{needed} is not installed here")
    picture = tmp_path / "square.png"
    picture.write_bytes(PICTURE)
    ran = subprocess.run(
        [*program, str(ROOT / "examples" / "http" / name), str(picture)],
        env={
            **os.environ,
            "PATH": PROGRAMS,
            "BLIPQ_URL": served.url,
            "GOCACHE": str(tmp_path / "go"),  # Go has none where HOME is unset
            "GOTOOLCHAIN": "local",  # and fetches no other version of itself
        },
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert '"status":"failed"' not in ran.stdout
    results = [json.loads(line) for line in ran.stdout.splitlines() if line]
    kinds = [result["kind"] for result in results]
    assert kinds == ["caption", "vqa", "match", "describe", "embed", "search"]
