"""Who may do what: keys and their tenants, and doors without keys."""

import json
import re
import socket
import stat
import time
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import pytest

from api.conftest import CAPTION, DoorProcess, Start, beside, running, service_of
from api.test_jobs import claim, code_of, finish, submitted
from blipq import Client, Settings
from blipq.contract import split_s3_uri
from blipq.ledger.worker import WorkerLedger
from blipq.local.sample import red_square
from blipq.local.stack import LocalStack
from blipq.s3.storage import Storage
from blipq_api.access.keys import Keyring, digest, make_first_key
from blipq_api.access.rates import WRONG_AT_ONCE
from conftest import blipq, wait_until


def new_key(file: Path, name: str, *options: str) -> str:
    ran = blipq("api", "keys", "new", name, "--file", str(file), *options)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys")


@pytest.fixture(scope="module")
def keys(folder: Path) -> dict[str, str]:
    """Keys of two tenants, and of an operator, in ``keys.toml``."""
    file = folder / "keys.toml"
    return {
        "shop": new_key(file, "shop", "--bucket", "photos/shop", "--model", "default"),
        "reader": new_key(file, "reader", "--tenant", "shop", "--scope", "read"),
        "other": new_key(file, "other", "--bucket", "*"),
        "operator": new_key(file, "operator", "--scope", "admin", "--scope", "read"),
    }


@pytest.fixture(scope="module")
def keyed_door(stack: LocalStack, keys: dict[str, str], folder: Path) -> Iterator[DoorProcess]:
    options = {"api_keys": str(folder / "keys.toml")}
    service = service_of(stack, beside(stack), folder / "door.log", options=options)
    yield running(service)
    service.stop(timeout=30)


@pytest.fixture
def guarded(keyed_door: DoorProcess, apart: Settings) -> DoorProcess:
    """A door with keys, on a database that is empty."""
    return keyed_door


MINE = {"kind": "caption", "image": "s3://photos/shop/cat.jpg"}


def test_a_key_has_256_bits_and_the_file_its_digest_alone(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    key, other = new_key(file, "a"), new_key(file, "b.c", "--bucket", 'x"y')
    assert re.fullmatch(r"blipq_[\w-]{43}", key)
    assert key != other
    assert key not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert set(tomllib.loads(file.read_text())["keys"]) == {"a", "b.c"}
    again = blipq("api", "keys", "new", "a", "--file", str(file))
    assert (again.returncode, "already" in again.stderr) == (2, True)


def test_a_first_key_is_made_once_and_may_do_everything(start: Start, tmp_path: Path) -> None:
    file = tmp_path / "new" / "keys.toml"
    kept = file.with_suffix(".key")
    door = start("--host", "0.0.0.0", "--make-key", api_keys=str(file))
    key = kept.read_text().strip()
    assert [stat.S_IMODE(each.stat().st_mode) for each in (file, kept)] == [0o600, 0o600]
    assert key not in file.read_text()
    assert key not in door.logged()
    url = door.url.replace("0.0.0.0", "127.0.0.1")
    anything = {"index": "i", "image": "https://example.org/cat.jpg", "kind": "embed"}
    options = {"model": "m", "output": "s3://results/b", "webhook": {"url": "https://example.org/"}}
    with DoorProcess(door.service, url, door.log).http(key) as http:
        submitted(http, {**anything, "options": options})
        assert http.get("/v1/workers").status_code == 200
    start("--make-key", api_keys=str(file))
    assert kept.read_text().strip() == key


def test_a_first_key_whose_making_was_cut_off_is_made_to_the_end(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    kept = make_first_key(file)
    assert kept is not None
    key = kept.read_text()
    file.unlink()
    assert make_first_key(file) == kept
    assert kept.read_text() == key
    assert Keyring(file).find(key.strip()) is not None
    assert make_first_key(file) is None


def test_another_tenants_job_does_not_exist(
    guarded: DoorProcess, keys: dict[str, str], ledger: WorkerLedger
) -> None:
    with guarded.http(keys["shop"]) as shop, guarded.http(keys["other"]) as other:
        id = submitted(shop, MINE)
        assert shop.get(f"/v1/jobs/{id}").json()["tenant"] == "shop"
        for method, path in (
            ("GET", ""),
            ("GET", "/result"),
            ("GET", "/events"),
            ("DELETE", ""),
            ("POST", "/cancel"),
            ("POST", "/retry"),
            ("POST", "/forget"),
        ):
            answer = other.request(method, f"/v1/jobs/{id}{path}")
            assert code_of(answer) == (404, "job_not_found")
            assert answer.json()["detail"] == (
                f"no job {id}: never submitted, or past its retention"
            )
        assert other.get("/v1/jobs").json()["jobs"] == []
        assert [job["id"] for job in shop.get("/v1/jobs").json()["jobs"]] == [id]
        finish(ledger, id)
        assert shop.get(f"/v1/jobs/{id}").json()["status"] == "succeeded"
    with guarded.http(keys["operator"]) as operator:
        assert operator.get(f"/v1/jobs/{id}").json()["tenant"] == "shop"


def test_idempotency_keys_are_the_tenants(guarded: DoorProcess, keys: dict[str, str]) -> None:
    ids = []
    for name in ("shop", "other"):
        with guarded.http(keys[name]) as http:
            first = submitted(http, MINE, Idempotency_Key="order-1")
            assert submitted(http, MINE, Idempotency_Key="order-1") == first
            ids.append(first)
    assert ids[0] != ids[1]


@pytest.mark.parametrize(
    ("body", "list"),
    [
        ({"kind": "caption", "image": "s3://photos/other/cat.jpg"}, "buckets"),
        ({"kind": "caption", "image": "s3://photos/shop/../other/cat.jpg"}, "buckets"),
        ({"kind": "caption", "image": "s3://photos/shopping/cat.jpg"}, "buckets"),
        ({"kind": "caption", "image": "s3://blipq-inbox/other/cat.jpg"}, "buckets"),
        ({"kind": "caption", "image": "https://example.org/cat.jpg"}, "image_hosts"),
        ({**MINE, "options": {"model": "m"}}, "models"),
        ({**MINE, "options": {"output": "s3://photos/shop/cat.json"}}, "outputs"),
        ({**MINE, "options": {"webhook": {"url": "https://example.org/"}}}, "webhook_hosts"),
        ({**MINE, "kind": "embed", "index": "photos"}, "indexes"),
        ({"kind": "search", "index": "photos", "text": "a cat"}, "indexes"),
    ],
)
def test_what_a_key_does_not_list_is_refused(
    guarded: DoorProcess, keys: dict[str, str], body: dict[str, Any], list: str
) -> None:
    with guarded.http(keys["shop"]) as http:
        answer = http.post("/v1/jobs", json=body)
        assert code_of(answer) == (403, "forbidden")
        assert f"{list} of the key 'shop'" in answer.json()["detail"]
        submitted(http, {"kind": "caption", "image": "s3://blipq-inbox/shop/cat.jpg"})


def test_a_key_without_a_scope_may_only_look(guarded: DoorProcess, keys: dict[str, str]) -> None:
    with guarded.http(keys["shop"]) as shop, guarded.http(keys["reader"]) as reader:
        id = submitted(shop, MINE)
        assert reader.get(f"/v1/jobs/{id}").status_code == 202
        assert code_of(reader.post("/v1/jobs", json=MINE)) == (403, "forbidden")
        for path in ("cancel", "retry", "forget"):
            assert code_of(reader.post(f"/v1/jobs/{id}/{path}")) == (403, "forbidden")
        assert code_of(shop.get("/v1/workers")) == (403, "forbidden")
        assert code_of(shop.get("/v1/webhooks")) == (403, "forbidden")


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer blipq_wrong"},
        {"Authorization": "Bearer"},
        {"Authorization": "Basic {key}"},
        {"X-Api-Key": "{key}"},
    ],
)
def test_without_a_key_of_the_door_nothing_is_told(
    guarded: DoorProcess, keys: dict[str, str], headers: dict[str, str]
) -> None:
    sent = {name: value.format(key=keys["shop"]) for name, value in headers.items()}
    with guarded.http() as http:
        for path in ("/v1/jobs", "/v1/jobs/job_1", "/v1/nothing"):
            answer = http.get(path, headers=sent)
            assert code_of(answer) == (401, "unauthorized")
            assert answer.headers["www-authenticate"] == "Bearer"
        assert http.get("/health").status_code == 200


def test_wrong_keys_of_an_address_have_a_limit_and_right_ones_are_always_taken(
    start: Start, keys: dict[str, str], folder: Path
) -> None:
    door = start(api_keys=str(folder / "keys.toml"), api_trusted_proxies="127.0.0.1")
    with door.http("blipq_wrong") as wrong, door.http(keys["shop"]) as shop, door.http() as http:
        for _ in range(WRONG_AT_ONCE):
            refused = wrong.get("/v1/models")
            assert code_of(refused) == (401, "unauthorized")
            # Nothing of it is taken for a secret and left out.
            assert "Authorization with Bearer and a key" in refused.text
        refused = wrong.get("/v1/models")
        assert code_of(refused) == (429, "too_many_wrong_keys")
        assert 1 <= int(refused.headers["retry-after"]) <= 10
        assert refused.headers["connection"] == "close"
        assert shop.get("/v1/models").status_code == 200, "a neighbour behind the same proxy"
        elsewhere = wrong.get("/v1/models", headers={"X-Forwarded-For": "203.0.113.9"})
        assert elsewhere.status_code == 401
        assert http.get("/v1/models").status_code == 401, "no key is no wrong one"
        assert http.get("/console/login").status_code == 200
        signed_in = http.post("/console/login", data={"key": keys["shop"]})
        assert signed_in.status_code == 303, "the sign-in page counts for itself"


def test_the_file_is_read_again_when_it_changes_and_a_broken_one_locks_nobody_out(
    guarded: DoorProcess, keys: dict[str, str], folder: Path
) -> None:
    file = folder / "keys.toml"

    def status(key: str) -> int:
        with guarded.http(key) as http:
            return http.get("/v1/models").status_code

    fresh = new_key(file, "fresh")
    wait_until(lambda: status(fresh) == 200, "the new key")
    whole = file.read_text()
    file.write_text("keys = 1")
    wait_until(lambda: status(fresh) == 200 and "stay as they are" in guarded.logged(), "the log")
    assert status(fresh) == 200
    entry = tomllib.loads(whole)["keys"]["fresh"]["sha256"]
    file.write_text(whole.replace(entry, "0" * 64))
    wait_until(lambda: status(fresh) == 401, "the key's end")
    assert status(keys["shop"]) == 200


def test_a_key_that_sends_too_much_is_told_when_to_come_again(
    start: Start, keys: dict[str, str], folder: Path
) -> None:
    door = start(api_keys=str(folder / "keys.toml"), api_rate="0.5")
    with door.http(keys["shop"]) as shop, door.http(keys["other"]) as other:
        first = shop.get("/v1/models")
        assert (first.headers["ratelimit-limit"], first.headers["ratelimit-remaining"]) == (
            "1",
            "0",
        )
        answer = shop.get("/v1/models")
        assert code_of(answer) == (429, "rate_limited")
        assert 1 <= int(answer.headers["retry-after"]) <= 2
        assert other.get("/v1/models").status_code == 200


def test_a_key_has_its_share_of_a_door_and_leaves_the_rest_to_others(
    start: Start, keys: dict[str, str], folder: Path
) -> None:
    door = start(api_keys=str(folder / "keys.toml"), api_concurrency="6")
    with door.http(keys["shop"]) as shop, door.http(keys["other"]) as other:
        path = f"/v1/jobs/{submitted(shop, MINE)}"
        with ExitStack() as streams:
            for _ in range(3):
                assert streams.enter_context(shop.stream("GET", f"{path}/events")).is_success
            for each in (f"{path}/events", f"{path}?wait=1", "/v1/models"):
                answer = shop.get(each)
                assert code_of(answer) == (429, "too_many_requests")
                assert answer.headers["retry-after"] == "1"
            assert other.get("/v1/models").status_code == 200
        wait_until(lambda: shop.get("/v1/models").status_code == 200, "the streams' end")


def test_forms_to_sign_in_that_do_not_come_leave_room_for_keys(
    start: Start, keys: dict[str, str], folder: Path
) -> None:
    door = start(api_keys=str(folder / "keys.toml"), api_concurrency="6")
    head = (
        "POST /console/login HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n"
        "Content-Type: application/x-www-form-urlencoded\r\n\r\n"
    )
    host, _, port = door.url.removeprefix("http://").partition(":")
    with door.http(keys["shop"]) as shop, door.http() as reader, ExitStack() as slow:
        for _ in range(4):
            sent = slow.enter_context(socket.create_connection((host, int(port)), 10))
            sent.sendall(head.encode())
        wait_until(lambda: reader.get("/console/login").status_code == 429, "the share's end")
        assert shop.get("/v1/models").status_code == 200


def without(file: Path, key: str) -> None:
    """Takes a key out of its file."""
    file.write_text(file.read_text().replace(digest(key), "0" * 64))


def test_streams_and_waits_end_with_their_key(start: Start, tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    key = new_key(file, "shop", "--bucket", "photos/shop")
    door = start(api_keys=str(file))
    with door.http(key) as http, door.http() as console:
        path = f"/v1/jobs/{submitted(http, MINE)}"
        assert console.post("/console/login", data={"key": key}).status_code == 303
        pages = f"/console/stages?id={path.rpartition('/')[2]}"
        with ThreadPoolExecutor() as threads, ExitStack() as streams:
            opened = [
                streams.enter_context(client.stream("GET", place))
                for client, place in ((http, f"{path}/events"), (console, pages))
            ]
            waiting = threads.submit(http.get, f"{path}?wait=12")
            time.sleep(0.5)
            without(file, key)
            for stream in opened:
                last = "".join(stream.iter_text()).strip().rpartition("\n\n")[2]
                name, data = last.split("\n")
                assert name == "event: closed"
                assert json.loads(data.removeprefix("data: "))["code"] == "unauthorized"
            assert code_of(waiting.result()) == (401, "unauthorized")


def test_a_stream_ends_with_its_session(guarded: DoorProcess, keys: dict[str, str]) -> None:
    with guarded.http(keys["shop"]) as shop, guarded.http() as console:
        id = submitted(shop, MINE)
        assert console.post("/console/login", data={"key": keys["shop"]}).status_code == 303
        (token,) = set(
            re.findall(r'name="form_token" value="(\w+)"', console.get("/console/").text)
        )
        with console.stream("GET", f"/console/stages?id={id}") as stream:
            lines = stream.iter_text()
            assert "queued" in next(lines) + next(lines)
            with guarded.http(Cookie=f"blipq_session={console.cookies['blipq_session']}") as page:
                page.post("/console/logout", data={"form_token": token})
            assert "event: closed" in "".join(lines)


def test_the_log_of_requests_tells_the_key_by_name_and_no_query(
    guarded: DoorProcess, keys: dict[str, str]
) -> None:
    with guarded.http(keys["shop"]) as http:
        http.headers["X-Request-ID"] = "r-1"
        answer = http.get("/v1/jobs?limit=7&metadata.card=4111")
        assert answer.headers["x-request-id"] == "r-1"
        http.headers["X-Request-ID"] = 'r"x'
        assert re.fullmatch("[0-9a-f]{16}", http.get("/v1/x").headers["x-request-id"])
    wait_until(lambda: '"/v1/x"' in guarded.logged(), "the log")
    lines = [json.loads(line) for line in guarded.logged().splitlines() if line.startswith("{")]
    (line,) = [line for line in lines if line["request_id"] == "r-1"]
    assert (line["path"], line["status"], line["key"]) == ("/v1/jobs", 200, "shop")
    assert "4111" not in guarded.logged()
    assert keys["shop"] not in guarded.logged()


# -- without keys --


def test_strangers_are_not_served_without_keys(stack: LocalStack) -> None:
    ran = blipq("api", "--host", "0.0.0.0", "--port", "0", stack=stack)
    assert ran.returncode == 78, ran.stderr
    assert "blipq api keys new" in ran.stderr.replace("\n", " ")


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"Host": "localhost:{port}"}, 200),
        ({"Host": "[::1]:{port}"}, 200),
        ({"Host": "attacker.example"}, 421),
        ({"Host": "127.0.0.1.attacker.example"}, 421),
        ({"Host": "localhost.attacker.example:{port}"}, 421),
        ({"Host": "["}, 421),
        ({"Origin": "http://127.0.0.1:{port}"}, 200),
        ({"Origin": "https://attacker.example"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, 200),
    ],
)
def test_pages_of_other_sites_reach_nothing_on_loopback(
    http: httpx2.Client, headers: dict[str, str], expected: int
) -> None:
    port = str(http.base_url.port)
    sent = {name: value.format(port=port) for name, value in headers.items()}
    answer = http.get("/v1/models", headers=sent)
    assert answer.status_code == expected, answer.text
    assert "access-control-allow-origin" not in answer.headers


def test_listed_origins_and_hosts_may_call(start: Start) -> None:
    origin = "https://app.example.org"
    door = start(api_origins=origin, api_hosts="door.internal")
    with door.http(Origin=origin) as http:
        answer = http.post("/v1/jobs", json=CAPTION)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (202, origin)
        asks = {"Access-Control-Request-Method": "POST"}
        preflight = http.options("/v1/jobs", headers=asks)
        assert "Idempotency-Key" in preflight.headers["access-control-allow-headers"]
        refused = http.options("/v1/jobs", headers={**asks, "Origin": "https://x.example"})
        assert refused.status_code == 403
        assert http.get("/v1/models", headers={"Host": "door.internal"}).status_code == 200


def test_forwarded_headers_count_from_trusted_proxies_alone(start: Start) -> None:
    forwarded = {"X-Forwarded-For": "203.0.113.9"}
    for trusted, expected in (({}, "127.0.0.1"), ({"api_trusted_proxies": "127.0.0.0/8"}, None)):
        door = start(**trusted)
        with door.http() as http:
            http.get("/v1/models", headers=forwarded)
        wait_until(lambda door=door: '"/v1/models"' in door.logged(), "the log")
        assert f'"client": "{expected or "203.0.113.9"}"' in door.logged()


def test_the_log_of_actions_names_keys_and_is_for_operators(
    guarded: DoorProcess, keys: dict[str, str], ledger: WorkerLedger
) -> None:
    with guarded.http(keys["shop"]) as shop, guarded.http(keys["operator"]) as operator:
        first, second = submitted(shop, MINE), submitted(shop, MINE)
        assert shop.post(f"/v1/jobs/{first}/cancel").status_code == 200
        finish(ledger, second)
        assert shop.post(f"/v1/jobs/{second}/forget").status_code == 200
        assert code_of(shop.get("/v1/actions")) == (403, "forbidden")
        page = operator.get("/v1/actions", params={"limit": "1"}).json()
        (newest,) = page["actions"]
        (oldest,) = operator.get("/v1/actions", params={"cursor": page["next_cursor"]}).json()[
            "actions"
        ]
        for wrong in ({"limit": "0"}, {"cursor": "x"}, {"by": "shop"}):
            assert code_of(operator.get("/v1/actions", params=wrong)) == (422, "invalid_request")
    found = [
        (each["name"], each["via"], each["action"], each["target"]) for each in (oldest, newest)
    ]
    assert found == [("shop", "api", "cancel", first), ("shop", "api", "forget", second)]


def test_forgetting_leaves_what_another_tenant_uploaded(
    guarded: DoorProcess, keys: dict[str, str], ledger: WorkerLedger, apart: Settings
) -> None:
    """The key may read it: that is no right to delete it."""
    with guarded.http(keys["shop"]) as shop, guarded.http(keys["other"]) as other:
        headers = {"Content-Type": "image/png"}
        uri = shop.post("/v1/uploads", content=red_square(), headers=headers).json()["uri"]
        for http, left in ((other, [f"{uri}: not in other's part of the inbox"]), (shop, [])):
            id = submitted(http, {**MINE, "image": uri})
            finish(ledger, id)
            told = http.post(f"/v1/jobs/{id}/forget").json()
            assert (told["left"], told["objects"]) == (left, [] if left else [uri])
            there = Storage(apart).head(*split_s3_uri(uri)) is not None
            assert there is bool(left)


def test_a_line_of_a_batch_is_refused_without_the_secrets_that_it_names(
    guarded: DoorProcess, keys: dict[str, str]
) -> None:
    body = {"kind": "caption", "image": "s3://elsewhere/cat.jpg?token=topsecret"}
    with guarded.http(keys["shop"]) as shop:
        single = shop.post("/v1/jobs", json=body)
        assert code_of(single) == (403, "forbidden")
        lines = {"Content-Type": "application/x-ndjson"}
        batch = shop.post("/v1/batches", content=json.dumps(body).encode(), headers=lines)
        assert "topsecret" not in batch.text
        assert batch.json()["error"]["detail"] == single.json()["detail"]


def test_a_jobs_record_holds_what_its_key_allows_for_its_worker(
    guarded: DoorProcess, keys: dict[str, str], ledger: WorkerLedger
) -> None:
    with guarded.http(keys["shop"]) as shop:
        single = submitted(shop, MINE)
        batch = shop.post(
            "/v1/batches",
            content=json.dumps(MINE),
            headers={"Content-Type": "application/x-ndjson"},
        )
    for id in (single, batch.json()["id"]):
        held = claim(ledger, id)
        assert json.loads(held.rights) == {"buckets": ["photos/shop", "blipq-inbox/shop/"]}


def test_a_tenant_at_its_limit_gets_429_and_others_nothing_of_it(
    guarded: DoorProcess, keys: dict[str, str], ledger: WorkerLedger, apart: Settings
) -> None:
    with Client(apart) as client:
        client.limit("shop", open_jobs=2)
    with guarded.http(keys["shop"]) as shop, guarded.http(keys["other"]) as other:
        first = submitted(shop, MINE, Idempotency_Key="order-1")
        submitted(shop, MINE)
        answer = shop.post("/v1/jobs", json=MINE)
        assert code_of(answer) == (429, "tenant_limited")
        told = answer.json()
        assert (told["tenant"], told["limit"], told["most"]) == ("shop", "open_jobs", 2)
        assert told["retryable"]
        names = ("RateLimit-Limit", "RateLimit-Remaining", "Retry-After")
        assert [answer.headers[name] for name in names] == ["2", "0", "1"]
        lines = {"Content-Type": "application/x-ndjson"}
        batch = shop.post("/v1/batches", content=json.dumps(MINE), headers=lines)
        assert code_of(batch) == (429, "tenant_limited")
        assert submitted(shop, MINE, Idempotency_Key="order-1") == first  # it is known
        for _ in range(3):
            submitted(other, MINE)
        claimed = claim(ledger, first)
        assert ledger.fail(claimed, '{"code": "internal", "message": "x"}', "{}")
        submitted(shop, MINE)
        assert code_of(shop.post(f"/v1/jobs/{first}/retry")) == (429, "tenant_limited")
