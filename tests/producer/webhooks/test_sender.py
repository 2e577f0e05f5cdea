"""What a sender does with events: sends, records, retries, gives up, on real HTTP receivers."""

import asyncio
import json
import threading
import time
from collections import Counter
from typing import Any

import pytest
import redis
from standardwebhooks import Webhook, WebhookVerificationError

from blipq import CaptionRequest, Client, Options, Settings
from blipq.errors import InvalidRequest
from blipq.ledger.operator import OperatorLedger
from blipq.ledger.worker import Claim, WorkerLedger
from blipq.ssrf.http import GuardedHttp
from blipq.submission import Submission
from blipq.webhooks.delivery import new_secret, tenant_secret, verdict_on, webhook_id
from blipq.webhooks.outbox import MAX_CRASHES, SUSPECT_AFTER, Event, Outbox
from blipq.webhooks.response import Answer, _retry_after
from blipq.webhooks.sender import Sender, Together
from conftest import wait_until
from producer.webhooks.conftest import CAPTION, End, sending
from receivers import SECRET, Receiver, receiving

LADDER = (0.0, 5.0, 300.0)


def settled(outbox: Outbox) -> None:
    wait_until(lambda: outbox.pending() == 0, "every event to be settled")


def take(outbox: Outbox, lease_s: float = 30.0, **room: int) -> list[Any]:
    return outbox.take(10, lease_s=lease_s, most_of_a_host=10, room=room)


# --- a delivery -----------------------------------------------------------------------------------


def test_a_delivery_tells_the_job_signed_and_is_done_with_2xx(
    hooked: Settings, client: Client, outbox: Outbox, receiver: Receiver, end: End
) -> None:
    receiver.behave = lambda got: 204
    id = end(receiver.url, metadata={"order": "42"})
    with sending(hooked):
        settled(outbox)
    (got,) = receiver.got
    event = Webhook(SECRET).verify(got.body, got.headers)
    info = client.job(id).info()
    assert event["type"] == "job.succeeded"
    assert event["data"] == json.loads(info.model_dump_json(exclude_none=True))
    assert event["data"]["result"]["captions"] == CAPTION["captions"]
    assert info.completed_at is not None
    assert event["timestamp"] == f"{info.completed_at:%Y-%m-%dT%H:%M:%S.%f}"[:-3] + "Z"
    assert got.id == webhook_id(f"{id}/job.succeeded")
    assert got.headers["content-type"] == "application/json"
    assert outbox.counts() == {"delivered": 1}


def test_a_sender_counts_its_attempts(
    hooked: Settings, outbox: Outbox, receiver: Receiver, end: End
) -> None:
    receiver.behave = lambda got: 500 if got.number == 1 else 200
    end(receiver.url)
    with sending(hooked) as sender:
        settled(outbox)
    told = sender.metrics.registry.get_sample_value
    assert told("blipq_sender_attempts_total", {"outcome": "refused"}) == 1
    assert told("blipq_sender_attempts_total", {"outcome": "delivered"}) == 1
    assert told("blipq_sender_attempt_seconds_count") == 2
    assert told("blipq_sender_sending") == 0


def test_a_changed_byte_an_old_timestamp_and_a_wrong_secret_fail_verification(
    hooked: Settings, outbox: Outbox, receiver: Receiver, end: End
) -> None:
    end(receiver.url)
    with sending(hooked):
        settled(outbox)
    (got,) = receiver.got
    assert Webhook(SECRET).verify(got.body, got.headers)
    changed = got.body.replace(b"red", b"bed")
    old = {**got.headers, "webhook-timestamp": str(int(time.time()) - 600)}
    for secret, body, headers in (
        (SECRET, changed, got.headers),
        (SECRET, got.body, old),
        (new_secret(), got.body, got.headers),
    ):
        with pytest.raises(WebhookVerificationError):
            Webhook(secret).verify(body, headers)


def test_while_secrets_change_either_verifies(
    hooked: Settings, outbox: Outbox, receiver: Receiver, end: End
) -> None:
    newer = new_secret()
    fields = {**hooked.model_dump(), "webhook_secrets": f"{newer},{SECRET}"}
    end(receiver.url)
    with sending(Settings.model_validate(fields)):
        settled(outbox)
    (got,) = receiver.got
    assert len(got.headers["webhook-signature"].split(" ")) == 2
    for secret in (newer, SECRET):
        assert Webhook(secret).verify(got.body, got.headers)


def test_a_tenants_event_verifies_by_its_own_secrets_and_no_other_tenants(
    hooked: Settings, outbox: Outbox, receiver: Receiver, end: End
) -> None:
    newer = new_secret()
    fields = {**hooked.model_dump(), "webhook_secrets": f"{newer},{SECRET}"}
    end(receiver.url, tenant="shop")
    with sending(Settings.model_validate(fields)):
        settled(outbox)
    (got,) = receiver.got
    for secret in (newer, SECRET):
        Webhook(tenant_secret(secret, "shop")).verify(got.body, got.headers)
        Webhook(secret).verify(got.body, got.headers)  # the deployment's own receivers
        with pytest.raises(WebhookVerificationError):
            Webhook(tenant_secret(secret, "zoo")).verify(got.body, got.headers)


def test_without_a_secret_events_wait_and_nothing_is_sent_unsigned(
    hooked: Settings, outbox: Outbox, receiver: Receiver, end: End
) -> None:
    end(receiver.url)
    with pytest.raises(InvalidRequest, match="BLIPQ_WEBHOOK_SECRETS"):
        Sender(hooked.model_copy(update={"webhook_secrets": ()}))
    assert (outbox.pending(), receiver.connections) == (1, 0)


def test_a_running_event_tells_the_running_job_even_after_it_has_ended(
    hooked: Settings, outbox: Outbox, receiver: Receiver, end: End
) -> None:
    end(receiver.url, events=["job.running", "job.succeeded"])
    with sending(hooked):
        settled(outbox)
    events = {each["type"]: each["data"] for each in (json.loads(got.body) for got in receiver.got)}
    assert events["job.running"]["status"] == "running"
    assert "result" not in events["job.running"]
    assert "completed_at" not in events["job.running"]
    assert events["job.succeeded"]["status"] == "succeeded"
    assert len({got.id for got in receiver.got}) == 2


def test_a_large_result_is_replaced_by_a_pointer(
    hooked: Settings, client: Client, outbox: Outbox, receiver: Receiver, end: End
) -> None:
    large = {"kind": "caption", "captions": [{"text": "é" * 11_000}]}
    end(receiver.url, large)
    uri = f"s3://{hooked.inbox_bucket}/result.json"
    client.storage.put(uri, b"{}", content_type="application/json")
    end(receiver.url, large, output=uri)
    with sending(hooked):
        settled(outbox)
    told = [json.loads(got.body)["data"] for got in receiver.got]
    assert all("result" not in data and data["status"] == "succeeded" for data in told)
    plain, pointed = sorted(told, key=lambda data: "result_url" in data)
    assert "blipq result" in plain["result_omitted"]
    assert pointed["result_uri"] == uri
    assert pointed["result_url"].startswith(f"{hooked.s3_endpoint_url}/")


# --- failures -------------------------------------------------------------------------------------


def test_every_attempt_sends_the_same_bytes_under_the_same_id(
    hooked: Settings, outbox: Outbox, receiver: Receiver, end: End
) -> None:
    receiver.behave = lambda got: 200 if got.number == 3 else 500
    uri = f"s3://{hooked.inbox_bucket}/presigned-once"
    end(receiver.url, {"kind": "caption", "captions": [{"text": "x" * 21_000}]}, output=uri)
    with sending(hooked):
        settled(outbox)
    assert len(receiver.got) == 3
    assert len({(got.id, got.body) for got in receiver.got}) == 1


@pytest.mark.parametrize("answer", [500, 404, 301, "drop"])
def test_what_is_not_2xx_is_tried_until_the_ladder_ends_and_then_dead(
    hooked: Settings, outbox: Outbox, receiver: Receiver, end: End, answer: Any
) -> None:
    receiver.behave = lambda got: answer
    id = end(receiver.url)
    with sending(hooked):
        settled(outbox)
    assert len(receiver.got) == len(hooked.webhook_ladder)
    (dead,) = outbox.listed(dead=True, limit=10)
    assert (dead["job_id"], dead["attempts"]) == (id, len(hooked.webhook_ladder))
    assert dead["outcome"] in ("refused", "redirected", "unreachable")


def test_410_stops_the_url_for_later_events_until_one_is_replayed(
    hooked: Settings, outbox: Outbox, receiver: Receiver, end: End
) -> None:
    receiver.behave = lambda got: 410
    end(receiver.url)
    other = receiver.url + "/other"
    with sending(hooked):
        settled(outbox)
        later = end(receiver.url)
        end(other)
        settled(outbox)
        paths = [got.path for got in receiver.got]
        assert sorted(paths) == ["/hook", "/hook/other"]
        dead = {each["event"]: each["outcome"] for each in outbox.listed(dead=True, limit=10)}
        assert sorted(dead.values()) == ["gone", "gone", "stopped"]
        receiver.behave = lambda got: 200
        assert outbox.replay(f"{later}/job.succeeded")
        settled(outbox)
    assert receiver.delivered[webhook_id(f"{later}/job.succeeded")] == 1


def test_an_address_inside_is_recorded_as_url_forbidden_and_dead_at_once(
    hooked: Settings, outbox: Outbox, end: End
) -> None:
    end("https://169.254.169.254/latest/meta-data")
    with sending(hooked):
        settled(outbox)
    (dead,) = outbox.listed(dead=True, limit=10)
    assert (dead["outcome"], dead["attempts"]) == ("url_forbidden", 1)


@pytest.mark.parametrize(
    ("outcome", "attempts", "verdict", "least", "most"),
    [
        ("delivered", 1, "delivered", 0, 0),
        ("refused", 1, "retry", 5, 6),
        ("timeout", 2, "retry", 300, 360),
        ("unresolved", 2, "retry", 300, 360),
        ("unreachable", 3, "dead", 0, 0),
        ("gone", 1, "stop", 0, 0),
        ("url_forbidden", 1, "dead", 0, 0),
    ],
)
def test_the_ladder_says_when_to_try_again(
    outcome: Any, attempts: int, verdict: str, least: float, most: float
) -> None:
    for _ in range(20):
        found, delay = verdict_on(Answer(outcome, ""), attempts, LADDER)
        assert found == verdict
        assert least <= delay <= most


def test_retry_after_is_a_least_pause_as_a_number_or_a_date() -> None:
    assert verdict_on(Answer("throttled", "", 60), 1, LADDER)[1] == 60
    assert verdict_on(Answer("throttled", "", 60), 2, LADDER)[1] >= 300
    assert _retry_after("7") == 7
    assert _retry_after("999999999") == 86400
    assert _retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert 80_000 < _retry_after("Wed, 21 Oct 2099 07:28:00 GMT") <= 86400
    assert _retry_after("soon") == _retry_after("-3") == _retry_after("") == 0


# --- leases ---------------------------------------------------------------------------------------


def test_a_taken_event_is_due_again_when_its_lease_is_over_and_the_stale_sender_is_refused(
    outbox: Outbox, end: End
) -> None:
    end("https://example.org/")
    (first,) = take(outbox, lease_s=0.05)
    assert take(outbox) == []
    again: list[Any] = []
    wait_until(lambda: again or again.extend(take(outbox)), "the lease to run out")
    assert (again[0].name, again[0].attempts) == (first.name, 2)
    assert not outbox.settle(first, "delivered", "delivered", "")
    assert outbox.keep_body(first, b"{}") is None
    assert outbox.settle(again[0], "delivered", "delivered", "")
    assert not outbox.settle(again[0], "delivered", "delivered", "")


def test_an_event_that_kills_its_sender_every_time_is_given_up_and_takes_no_neighbour_along(
    hooked: Settings, outbox: Outbox, receiver: Receiver, end: End
) -> None:
    """Senders die with all that they have taken, whenever the poison is among it."""
    poison, *neighbours = [f"{end(receiver.url)}/job.succeeded" for _ in range(5)]
    deaths = 0

    def round_() -> bool:
        nonlocal deaths
        taken = take(outbox, lease_s=0.2)
        if any(event.name == poison for event in taken):
            deaths += 1
        else:
            for event in taken:
                outbox.settle(event, "delivered", "delivered", "")
        return outbox.pending() == 0

    wait_until(round_, "every event to be settled")
    (dead,) = outbox.listed(dead=True, limit=10)
    assert (dead["event"], dead["outcome"], deaths) == (poison, "crashed", MAX_CRASHES)
    assert outbox.counts() == {"crashed": 1, "delivered": len(neighbours)}
    assert outbox.replay(poison) == [poison]
    with sending(hooked):
        settled(outbox)
    assert [got.id for got in receiver.got] == [webhook_id(poison)]


def test_an_attempt_that_was_answered_is_no_crash(outbox: Outbox, end: End) -> None:
    end("https://example.org/")
    for _ in range(MAX_CRASHES + 1):
        (event,) = take(outbox)
        assert event.crashes == 0
        assert outbox.settle(event, "retry", "refused", "HTTP 500", 0)


def test_one_suspect_is_sent_at_a_time(outbox: Outbox, end: End) -> None:
    for _ in range(3):
        end("https://example.org/")
    for _ in range(SUSPECT_AFTER):
        wait_until(lambda: len(take(outbox, lease_s=0.01)) == 3, "the leases to run out")
    wait_until(lambda: len(take(outbox, lease_s=30)) == 1, "a suspect")
    assert outbox.take(10, lease_s=30, most_of_a_host=10, room={}, suspects=0) == []


def test_senders_of_one_process_try_one_suspect_at_a_time(
    hooked: Settings, outbox: Outbox, receiver: Receiver, end: End
) -> None:
    """They die together: an innocent one would be counted with the one that ended them."""
    suspect = end(receiver.url)
    for _ in range(SUSPECT_AFTER):
        wait_until(lambda: len(take(outbox, lease_s=0.01)) == 1, "the lease to run out")
    together = Together()
    together.has_suspect = True  # of another sender
    with sending(hooked, together=together):
        other = end(receiver.url)
        wait_until(lambda: receiver.got, "the other event")
        assert [json.loads(got.body)["data"]["id"] for got in receiver.got] == [other]
        together.has_suspect = False
        settled(outbox)
    assert json.loads(receiver.got[-1].body)["data"]["id"] == suspect
    assert not together.has_suspect


def test_a_sender_that_cannot_work_ends_no_other_of_its_process(
    hooked: Settings, outbox: Outbox, receiver: Receiver, end: End, caplog: pytest.LogCaptureFixture
) -> None:
    server, _, _ = hooked.redis_url.rpartition("/")
    broken = hooked.model_copy(update={"redis_url": f"{server}/9999", "cell": "b"})
    with sending(hooked, beside=[broken]):
        wait_until(lambda: "no events of b" in caplog.text, "the broken one")
        end(receiver.url)
        settled(outbox)
    assert len(receiver.got) == 1


def test_a_host_gets_no_more_than_its_room(outbox: Outbox, end: End) -> None:
    for _ in range(3):
        end("https://a.example/")
        end("https://b.example/")
    room = {"a.example": 1}
    taken = outbox.take(10, lease_s=30, most_of_a_host=2, room=room)
    assert sorted(event.record["host"] for event in taken) == [
        "a.example",
        "b.example",
        "b.example",
    ]
    assert (
        outbox.take(10, lease_s=30, most_of_a_host=2, room={"a.example": 0, "b.example": 0}) == []
    )


def test_many_names_of_one_server_take_no_more_places_than_one(
    hooked: Settings, outbox: Outbox, receiver: Receiver
) -> None:
    """Before, names of a server that never answers held all places, for the timeout each."""
    names = [f"h{number}.evil.example" for number in range(24)]
    settings = hooked.model_copy(
        update={
            "webhook_allow": ("good.example", *names),
            "webhook_concurrency": 8,
            "webhook_host_concurrency": 2,
            "webhook_timeout_s": 60.0,
        }
    )

    async def resolve(host: str, port: int) -> list[str]:
        return ["127.0.0.1"]

    http = GuardedHttp(settings.webhook_policy, timeout_s=60.0, resolve=resolve)
    with Client(settings) as client, receiving(lambda got: "hang") as tarpit:

        def end(host: str, port: int) -> None:
            webhook = {"url": f"http://{host}:{port}/"}
            client.caption("s3://uploads/cat.jpg", webhook=webhook).cancel()

        for name in names:
            end(name, tarpit.port)
        with sending(settings, http):
            wait_until(lambda: tarpit.holding == 2, "the server to hold its places")
            end("good.example", receiver.port)
            wait_until(lambda: len(receiver.got) == 1, "the other receiver to be told")
            assert (tarpit.most_held, len(tarpit.got)) == (2, 2)
            put_back = [e["attempts"] for e in outbox.listed(dead=False, limit=50)]
            assert sorted(put_back)[:-2] == [0] * 22, "what was put back was no attempt"
            tarpit.close()


def test_a_tenant_with_many_silent_servers_holds_up_no_other(
    hooked: Settings, outbox: Outbox, receiver: Receiver
) -> None:
    """Each name has an address of its own: before, they held all places, for the timeout each."""
    names = [f"h{number}.evil.example" for number in range(24)]
    settings = hooked.model_copy(
        update={
            "webhook_allow": ("good.example", *names),
            "webhook_concurrency": 8,
            "webhook_host_concurrency": 8,
            "webhook_timeout_s": 60.0,
        }
    )
    asked: list[str] = []

    async def resolve(host: str, port: int) -> list[str]:
        if host != "good.example":
            asked.append(host)
            await asyncio.sleep(3600)  # which the sender gives 5 s
        return ["127.0.0.1"]

    http = GuardedHttp(settings.webhook_policy, timeout_s=60.0, resolve=resolve)
    with Client(settings) as client:

        def end(host: str, tenant: str) -> None:
            request = CaptionRequest(image="s3://uploads/cat.jpg")
            options = Options(webhook={"url": f"http://{host}:{receiver.port}/"})
            client.submit(Submission(request, options, tenant=tenant)).cancel()

        def put_back() -> int:
            return sum(not event["attempts"] for event in outbox.listed(dead=False, limit=50))

        for name in names:
            end(name, "evil")
        with sending(settings, http):
            wait_until(lambda: len(asked) == 2, "the tenant to have its places")
            end("good.example", "good")
            wait_until(lambda: len(receiver.got) == 1, "the other tenant to be told")
            wait_until(lambda: put_back() == 22, "the others to be put back, which is no attempt")
            # A host that answers is not held up by a tenant that has no place.
            end("good.example", "evil")
            end("good.example", "good")
            wait_until(lambda: len(receiver.got) == 3, "both to be told", 30)


def test_events_that_have_no_place_are_not_taken_again_and_again(
    hooked: Settings, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, each of a host's events was taken and put back while silent hosts had all places."""
    names = ["h1.evil.example", "h2.evil.example", "h3.evil.example", "late.example"]
    settings = hooked.model_copy(
        update={
            "webhook_allow": tuple(names),
            "webhook_concurrency": 4,
            "webhook_timeout_s": 60.0,
        }
    )
    silent = threading.Event()
    silent.set()
    asked: list[str] = []
    taken: Counter[str] = Counter()
    take = Outbox.take

    def counted(self: Outbox, *given: Any, **options: Any) -> list[Event]:
        events = take(self, *given, **options)
        taken.update(event.record["host"].partition(":")[0] for event in events)
        return events

    async def resolve(host: str, port: int) -> list[str]:
        asked.append(host)
        while silent.is_set():
            await asyncio.sleep(0.02)
        return ["127.0.0.1"]

    monkeypatch.setattr(Outbox, "take", counted)
    monkeypatch.setattr("blipq.ssrf.http.RESOLVE_TIMEOUT_S", 60.0)
    monkeypatch.setattr("blipq.webhooks.sender.CROWDED_S", 600.0)
    http = GuardedHttp(settings.webhook_policy, timeout_s=60.0, resolve=resolve)
    with Client(settings) as client:

        def end(host: str) -> None:
            webhook = {"url": f"http://{host}:{receiver.port}/"}
            client.caption("s3://uploads/cat.jpg", webhook=webhook).cancel()

        with sending(settings, http):
            for name in names[:3]:
                end(name)
            wait_until(lambda: len(asked) == 3, "the silent hosts to have their places")
            for _ in range(50):
                end("late.example")
            wait_until(lambda: taken["late.example"] > 0, "an event of the other")
            time.sleep(1)  # ten polls
            of_late = taken["late.example"]
            silent.clear()
    assert of_late <= 4


def test_names_that_do_not_resolve_hold_up_no_receiver_that_answers(
    hooked: Settings, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor where they come without a tenant: before, they held all places."""
    monkeypatch.setattr("blipq.ssrf.http.RESOLVE_TIMEOUT_S", 60.0)
    names = [f"h{number}.evil.example" for number in range(24)]
    allowed = ("good.example", *names)
    settings = hooked.model_copy(
        update={"webhook_allow": allowed, "webhook_concurrency": 8, "webhook_timeout_s": 60.0}
    )
    silent = threading.Event()
    asked: list[str] = []
    silent.set()

    async def resolve(host: str, port: int) -> list[str]:
        if host != "good.example":
            asked.append(host)
        while host != "good.example" and silent.is_set():
            await asyncio.sleep(0.02)
        return ["127.0.0.1"]

    http = GuardedHttp(settings.webhook_policy, timeout_s=60.0, resolve=resolve)
    with Client(settings) as client:

        def end(host: str) -> None:
            webhook = {"url": f"http://{host}:{receiver.port}/"}
            client.caption("s3://uploads/cat.jpg", webhook=webhook).cancel()

        with sending(settings, http):
            end("good.example")
            wait_until(lambda: len(receiver.got) == 1, "the receiver to have answered")
            for name in names:
                end(name)
            wait_until(lambda: len(asked) == 6, "the others to have their places")
            end("good.example")
            wait_until(lambda: len(receiver.got) == 2, "the receiver to be told again")
            assert len(asked) == 6
            silent.clear()


def test_an_event_that_is_put_back_is_no_attempt_and_due_later(outbox: Outbox, end: End) -> None:
    end("https://a.example/")
    for _ in range(MAX_CRASHES + 1):
        (event,) = take(outbox)
        assert (event.attempts, event.crashes) == (1, 0)
        assert outbox.settle(event, "defer", "crowded", "no room")
    (event,) = take(outbox)
    assert outbox.settle(event, "defer", "crowded", "no room", 60.0)
    assert take(outbox) == []
    assert "crowded" not in outbox.counts()


# --- what is kept, and for how long ---------------------------------------------------------------


def test_a_job_is_kept_while_its_event_waits_and_no_longer_for_its_sake(
    outbox: Outbox, raw_redis: "redis.Redis", end: End
) -> None:
    id = end("https://example.org/")
    key, event = f"blipq:job:{id}", f"blipq:event:{id}/job.succeeded"
    assert raw_redis.ttl(key) > 5 * 86400
    assert raw_redis.ttl(event) > 5 * 86400
    (taken,) = take(outbox)
    assert outbox.settle(taken, "retry", "refused", "", 30 * 86400)
    assert min(raw_redis.ttl(key), raw_redis.ttl(event)) > 31 * 86400
    assert outbox.replay(id) == [taken.name]
    (taken,) = take(outbox)
    assert outbox.settle(taken, "delivered", "delivered", "")
    assert not raw_redis.exists(event)
    assert 86000 < raw_redis.ttl(key) <= 86400


def test_a_dead_event_is_kept_for_two_weeks(
    outbox: Outbox, raw_redis: "redis.Redis", end: End
) -> None:
    id = end("https://example.org/")
    (taken,) = take(outbox)
    assert outbox.keep_body(taken, b"{}") == b"{}"
    assert outbox.settle(taken, "dead", "refused", "HTTP 500")
    assert 13 * 86400 < raw_redis.ttl(f"blipq:event:{id}/job.succeeded") <= 14 * 86400
    assert (outbox.pending(), outbox.dead()) == (0, 1)


def test_a_dead_letter_that_is_tried_again_has_an_event_of_its_own(
    client: Client, ledger: WorkerLedger, outbox: Outbox
) -> None:
    job = client.caption("s3://uploads/cat.jpg", webhook={"url": "https://example.org/"})
    error = json.dumps({"code": "attempts_exhausted", "message": "died", "retryable": False})

    def fail() -> None:
        claim = ledger.claim(job.id, "w1")
        assert isinstance(claim, Claim)
        assert ledger.fail(claim, error, "{}", dead=True)

    fail()
    assert OperatorLedger.beside(ledger).retry_dead_letter(job.id)
    (first,) = take(outbox)
    assert first.job is not None
    assert (first.job["status"], json.loads(first.job["error"])["message"]) == ("failed", "died")
    fail()
    (second,) = take(outbox)
    assert first.webhook_id != second.webhook_id
    assert outbox.settle(first, "delivered", "delivered", "")
    assert second.job is not None


def test_a_delivered_event_of_a_kept_job_can_be_replayed_under_its_id(
    hooked: Settings, outbox: Outbox, receiver: Receiver, end: End
) -> None:
    id = end(receiver.url)
    with sending(hooked):
        settled(outbox)
        assert outbox.replay(id) == [f"{id}/job.succeeded"]
        settled(outbox)
    first, second = receiver.got
    assert (first.id, first.body) == (second.id, second.body)
    assert outbox.replay("job_unknown") == []


def test_two_senders_share_the_work_and_repeat_nothing(
    hooked: Settings, outbox: Outbox, end: End
) -> None:
    with receiving() as receiver:
        ids = [end(receiver.url) for _ in range(30)]
        with sending(hooked), sending(hooked):
            settled(outbox)
        assert sorted(got.id for got in receiver.got) == sorted(
            webhook_id(f"{id}/job.succeeded") for id in ids
        )
