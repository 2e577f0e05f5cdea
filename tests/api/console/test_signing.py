"""Sessions of the console: how they begin, what they may do, and when they end."""

import re

import httpx2
import pytest
import redis

from api.conftest import DoorProcess, Start
from api.console.conftest import Keyed, page
from blipq import Client
from blipq_api.access.rates import SIGN_INS_AT_ONCE
from conftest import wait_until


def test_a_key_becomes_a_cookie_that_no_script_reads_and_no_other_site_sends(
    keyed: Keyed, raw_redis: "redis.Redis"
) -> None:
    with keyed.door.http() as http:
        shown = http.get("/console/jobs?status=failed")
        assert (shown.status_code, shown.headers["location"]) == (
            303,
            "login?next=jobs%3Fstatus%3Dfailed",
        )
        given = {"key": keyed.keys["operator"], "next": "jobs?status=failed"}
        answer = http.post("/console/login", data=given)
        assert (answer.status_code, answer.headers["location"]) == (303, "jobs?status=failed")
        cookie = answer.headers["set-cookie"]
        assert re.fullmatch(
            r"blipq_session=[\w-]{43}; HttpOnly; Max-Age=43200; SameSite=strict", cookie
        )
        assert keyed.keys["operator"] not in cookie
        assert http.get("/console/jobs").status_code == 200
    (name,) = raw_redis.scan_iter("blipq:session:*")
    token = cookie.partition("=")[2].partition(";")[0]
    assert token not in f"{name}{raw_redis.get(name)}"  # type: ignore[str-bytes-safe]
    assert 43_000 < int(raw_redis.ttl(name)) <= 43_200  # type: ignore[arg-type]


def test_the_cookie_stays_on_https_where_the_proxy_says_that_it_is(keyed: Keyed) -> None:
    with keyed.door.http(**{"X-Forwarded-Proto": "https"}) as http:
        answer = http.post("/console/login", data={"key": keyed.keys["operator"]})
    assert "; Secure" in answer.headers["set-cookie"]


@pytest.mark.parametrize("key", ["", "blipq_wrong", "' or 1=1", "\ud7ff\u0000"])
def test_a_wrong_key_opens_nothing_and_the_page_says_how_to_make_one(
    keyed: Keyed, key: str
) -> None:
    with keyed.door.http() as http:
        answer = http.post("/console/login", data={"key": key})
        assert answer.status_code == 401
        assert "blipq api keys new" in answer.text
        assert "set-cookie" not in answer.headers
        assert http.get("/console/").status_code == 303


def test_a_right_key_signs_in_whatever_its_address_sent_before(start: Start, keyed: Keyed) -> None:
    door = start(api_keys=str(keyed.file), api_trusted_proxies="127.0.0.1")
    with door.http() as http:
        for status in [401] * 10 + [429] * 2:
            answer = http.post("/console/login", data={"key": "blipq_wrong"})
            assert answer.status_code == status
        assert 1 <= int(answer.headers["retry-after"]) <= 10
        assert "too many wrong keys" in answer.text
        right = {"key": keyed.keys["shop"]}
        assert http.post("/console/login", data=right).status_code == 303
        assert http.post("/console/login", data={"key": "blipq_wrong"}).status_code == 429
        elsewhere = {"X-Forwarded-For": "203.0.113.9"}
        answer = http.post("/console/login", data={"key": "blipq_wrong"}, headers=elsewhere)
        assert answer.status_code == 401


def test_one_key_begins_so_many_sessions_and_others_go_on(start: Start, keyed: Keyed) -> None:
    door = start(api_keys=str(keyed.file))
    with door.http() as http:
        for status in [303] * SIGN_INS_AT_ONCE + [429]:
            answer = http.post("/console/login", data={"key": keyed.keys["shop"]})
            assert answer.status_code == status
        assert "signed in too often" in answer.text
        assert http.post("/console/login", data={"key": keyed.keys["other"]}).status_code == 303


@pytest.mark.parametrize(
    "next", ["//evil.example", "https://evil.example", "/v1/jobs", "\\\\evil", "javascript:hit()"]
)
def test_signing_in_leads_to_no_other_place(keyed: Keyed, next: str) -> None:
    with keyed.door.http() as http:
        answer = http.post("/console/login", data={"key": keyed.keys["shop"], "next": next})
        assert answer.headers["location"] == "."


def test_a_session_opens_the_console_alone_and_a_key_does_not_open_it(keyed: Keyed) -> None:
    with keyed.signed_in() as http:
        cookie = http.cookies["blipq_session"]
    with keyed.door.http(Cookie=f"blipq_session={cookie}") as http:
        assert http.get("/console/jobs").status_code == 200
        assert http.get("/v1/jobs").status_code == 401
    with keyed.door.http(keyed.keys["operator"]) as http:
        assert http.get("/console/jobs").status_code == 303


@pytest.mark.parametrize(
    "cookies",
    [
        'theme={"dark": true}; blipq_session=%s',
        "a[b]=1; blipq_session=%s; c=",
        f"seen={'x' * 5000}; blipq_session=%s",
        "blipq_session=%s; blipq_session=of-a-wider-path",
    ],
)
def test_cookies_of_other_services_of_the_host_end_no_session(keyed: Keyed, cookies: str) -> None:
    with keyed.signed_in() as http:
        token = http.cookies["blipq_session"]
    with keyed.door.http(Cookie=cookies % token) as http:
        assert http.get("/console/jobs").status_code == 200


def test_signing_out_ends_the_session_itself(keyed: Keyed) -> None:
    with keyed.signed_in() as http:
        cookie = http.cookies["blipq_session"]
        token = page(http, "").values("value")[0]
        assert http.post("/console/logout", data={"form_token": token}).status_code == 303
    with keyed.door.http(Cookie=f"blipq_session={cookie}") as http:
        assert http.get("/console/").status_code == 303


def test_a_session_ends_with_its_key(keyed: Keyed) -> None:
    kept = keyed.file.read_text()
    with keyed.signed_in("other") as http:
        assert http.get("/console/").status_code == 200
        try:
            keyed.file.write_text(kept.replace('[keys."other"]', '[keys."others"]', 1))
            assert http.get("/console/").status_code in (200, 303)
            digest = re.search(r'\[keys."others"]\nsha256 = "(\w+)"', keyed.file.read_text())
            assert digest is not None
            keyed.file.write_text(kept.replace(digest[1], "0" * 64))
            wait_until(lambda: http.get("/console/").status_code == 303, "the end of the session")
        finally:
            keyed.file.write_text(kept)
        wait_until(lambda: http.get("/console/").status_code == 200, "the key that is back")


def test_a_form_without_this_sessions_token_does_nothing(keyed: Keyed, client: Client) -> None:
    job = client.caption("s3://photos/cat.jpg")
    with keyed.signed_in() as http, keyed.signed_in() as another:
        foreign = page(another, f"job?id={job.id}").fields("cancel")["form_token"]
        own = page(http, f"job?id={job.id}").fields("cancel")["form_token"]
        for token in ("", "wrong", foreign):
            answer = cancel(http, job.id, token)
            assert (answer.status_code, "stale_form" in answer.text) == (403, True)
        for headers in ({"Sec-Fetch-Site": "cross-site"}, {"Origin": "https://evil.example"}):
            assert cancel(http, job.id, own, **headers).status_code == 403
        assert job.info().status == "queued"
        assert cancel(http, job.id, own).status_code == 303
        assert job.info().status == "cancelled"


def cancel(http: httpx2.Client, id: str, token: str, **headers: str) -> httpx2.Response:
    data = {"id": id, "action": "cancel", "form_token": token}
    return http.post("/console/job", data=data, headers=headers)


def test_the_log_of_actions_names_the_key_whose_session_acted(keyed: Keyed, client: Client) -> None:
    with keyed.door.http(keyed.keys["shop"]) as api:
        body = {"kind": "caption", "image": "s3://photos/shop/cat.jpg"}
        id = api.post("/v1/jobs", json=body).json()["id"]
    with keyed.signed_in("shop") as http:
        for action in ("cancel", "forget"):
            form = page(http, f"job?id={id}").fields(action)
            assert http.post("/console/job", data=form).status_code == 303
    with keyed.door.http(keyed.keys["operator"]) as api:
        actions = api.get("/v1/actions").json()["actions"]
    assert [(each["name"], each["via"], each["action"]) for each in actions] == [
        ("shop", "api", "forget"),
        ("shop", "api", "cancel"),
    ]


def test_a_reading_key_sees_no_button_and_its_forms_do_nothing(
    keyed: Keyed, client: Client
) -> None:
    with keyed.door.http(keyed.keys["shop"]) as api:
        body = {"kind": "caption", "image": "s3://photos/shop/cat.jpg"}
        id = api.post("/v1/jobs", json=body).json()["id"]
    with keyed.signed_in("reader") as http:
        shown = page(http, f"job?id={id}")
        assert 'name="action"' not in shown.text
        assert 'href="try"' not in shown.text
        token = shown.values("value")[0]
        answer = cancel(http, id, token)
        assert (answer.status_code, "--scope" in answer.text) == (403, True)
        assert http.get("/console/webhooks").status_code == 403
        assert http.get("/console/try").status_code == 403
    assert client.job(id).info().status == "queued"


def test_another_tenants_job_is_on_no_page(keyed: Keyed, client: Client) -> None:
    with keyed.door.http(keyed.keys["shop"]) as api:
        body = {"kind": "caption", "image": "s3://photos/shop/cat.jpg"}
        id = api.post("/v1/jobs", json=body).json()["id"]
    with keyed.signed_in("other") as http:
        for path in ("job", "picture", "stages"):
            assert http.get(f"/console/{path}?id={id}").status_code == 404
        assert id not in page(http, "jobs").text
        token = page(http, "").values("value")[0]
        assert cancel(http, id, token).status_code == 404
    with keyed.signed_in("reader") as http:
        assert id in page(http, "jobs").text
    assert client.job(id).info().status == "queued"


def test_a_door_without_keys_needs_no_signing_in_but_its_own_forms(
    door: DoorProcess, client: Client
) -> None:
    job = client.caption("s3://photos/cat.jpg")
    with door.http() as http:
        assert http.get("/console/login").headers["location"] == "."
        shown = page(http, f"job?id={job.id}")
        assert "Sign out" not in shown.text
        assert cancel(http, job.id, "").status_code == 403
        assert cancel(http, job.id, shown.fields("cancel")["form_token"]).status_code == 303
        assert job.info().status == "cancelled"
        elsewhere = http.get("/console/", headers={"Host": "evil.example"})
        assert (elsewhere.status_code, "localhost" in elsewhere.text) == (421, True)
