"""What may stand in a Celery message, and what is refused before Celery sees it."""

import base64
import json
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from kombu.transport.redis import Channel
from kombu.transport.virtual import Message

from blipq import Kind
from blipq_worker.messages.envelope import MAX_DEPTH, WHY, Malformed, rewrite, sound

ID = "job_1"
QUEUE = "blipq.default.normal"
REQUEST = {"image": "s3://photos/cat.jpg"}
BODY = json.dumps([[ID, REQUEST], {}, {}])
DEEP = json.loads("[" * 200 + "]" * 200)


def raw(body: Any = BODY, **changes: Any) -> dict[str, Any]:
    """A message as it lies in Redis, with other headers, or with other parts."""
    parts = {name: changes.pop(name) for name in ("headers", "properties") if name in changes}
    headers = {"task": "blipq.caption", "id": ID, "lang": "js"}
    return {
        "body": body,
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {**headers, **changes},
        "properties": {"delivery_tag": "t", "delivery_info": {"exchange": "x"}},
    } | parts


def properties(**changes: Any) -> dict[str, Any]:
    return {"delivery_tag": "t", "delivery_info": {}} | changes


def opened(message: Any) -> Message:
    """What a worker makes of a message in a queue. Raises Malformed."""
    made = Message(sound(message, QUEUE), channel=channel())
    assert not made.errors, made.errors
    rewrite(made)
    return made


def channel() -> Any:
    """As much of a channel as a message needs."""

    def decode_body(body: str, encoding: str | None = None) -> Any:
        return Channel.codecs[encoding].decode(body) if encoding else body

    return SimpleNamespace(decode_body=decode_body)


def body_of(message: Any) -> Any:
    return json.loads(message.body)


# --- what is well formed --------------------------------------------------------------------------


def test_a_message_of_a_celery_client_stays_what_it_is() -> None:
    sent: list[Any] = []
    app = Celery(broker="memory://", set_as_current=False)
    with app.amqp.producer_pool.acquire() as producer:
        producer.publish = lambda body, **options: sent.append((body, options))
        app.send_task(
            "blipq.vqa", args=[ID, REQUEST], kwargs={"options": {}}, producer=producer, task_id=ID
        )
    body, options = sent[0]
    message = opened(raw(json.dumps(body), headers=options["headers"]))
    assert message.headers["task"] == "blipq.vqa"
    assert message.headers["id"] == ID
    assert body_of(message)[:2] == [[ID, REQUEST], {"options": {}}]


def test_arguments_may_be_named() -> None:
    message = opened(raw(json.dumps([[], {"id": ID, "request": REQUEST}, {}])))
    assert body_of(message)[:2] == [[], {"id": ID, "request": REQUEST}]


def test_a_body_may_be_base64() -> None:
    encoded = base64.b64encode(BODY.encode()).decode()
    message = opened(raw(encoded, properties=properties(body_encoding="base64")))
    assert body_of(message)[0] == [ID, REQUEST]


def test_a_message_of_celerys_first_protocol_is_understood() -> None:
    old = {"task": "blipq.caption", "id": ID, "args": [ID, REQUEST], "kwargs": {}}
    message = opened(raw(json.dumps(old), headers={}))
    assert message.headers["task"] == "blipq.caption"
    assert body_of(message)[0] == [ID, REQUEST]


def test_headers_that_a_worker_does_not_need_are_not_passed_on() -> None:
    message = opened(raw(replaced_task_nesting="x", traceparent={"a": 1}, contract=7))
    assert set(message.headers) == {"task", "id", "lang"}


@pytest.mark.parametrize("name", ["callbacks", "errbacks", "chain"])
def test_celery_is_shown_nothing_to_do_after_a_task(name: str) -> None:
    """Whatever it could not do left the message in hand for ever."""
    message = opened(raw(json.dumps([[ID, REQUEST], {}, {name: [{}], "chord": {}}])))
    assert body_of(message) == [[ID, REQUEST], {}, {}]


def test_the_group_and_the_stamps_of_a_task_are_not_passed_on() -> None:
    message = opened(raw(group="g", stamps={"a": "b"}, stamped_headers=["a"]))
    assert set(message.headers) == {"task", "id", "lang"}


def test_a_message_goes_back_to_the_queue_that_it_came_from() -> None:
    assert sound(raw(), QUEUE)["properties"]["delivery_info"]["routing_key"] == QUEUE


# --- what is refused ------------------------------------------------------------------------------

BODIES = {
    "two parts": json.dumps([[ID, REQUEST], {}]),
    "four parts": json.dumps([[ID, REQUEST], {}, {}, {}]),
    "an object": json.dumps({"id": ID, "request": REQUEST}),
    "an empty list": "[]",
    "null": "null",
    "a number": "5",
    "a huge number": "1" * 5000,
    "nothing": "",
    "no JSON": "hello",
    "no text": {"a": 1},
    "arguments null": json.dumps([None, {}, {}]),
    "arguments an object": json.dumps([{"id": ID}, {}, {}]),
    "named arguments null": json.dumps([[ID, REQUEST], None, {}]),
    "options null": json.dumps([[ID, REQUEST], {}, None]),
    "too many arguments": json.dumps([[ID, REQUEST, {}, 4], {}, {}]),
    "an argument twice": json.dumps([[ID], {"id": ID}, {}]),
    "an unknown argument": json.dumps([[ID], {"x": 1}, {}]),
    "no arguments": json.dumps([[], {}, {}]),
    "an id that is no text": json.dumps([[{"a": 1}, REQUEST], {}, {}]),
    "an empty id": json.dumps([["", REQUEST], {}, {}]),
    "a long id": json.dumps([["x" * 100_000, REQUEST], {}, {}]),
    "an id that cannot be printed": json.dumps([["n\x00\n", REQUEST], {}, {}]),
    "half a character as an id": json.dumps([["\ud800", REQUEST], {}, {}]),
    "texts": json.dumps(["x", "y", "z"]),
    "a chain that is none": json.dumps([[ID, REQUEST], {}, {"chain": 5, "chord": 5}]),
    "nested deep": "[" * 50_000 + "]" * 50_000,
    "nested deeper than can be told": json.dumps([[ID, DEEP], {}, {}]),
    "a type that kombu cannot make": json.dumps(
        [[ID, {"__type__": "decimal", "__value__": "x"}], {}, {}]
    ),
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
def test_a_body_that_is_none_is_refused_under_the_jobs_id(body: Any) -> None:
    with pytest.raises(Malformed) as refused:
        opened(raw(body))
    assert (refused.value.id, refused.value.kind) == (ID, Kind.CAPTION)


HEADERS = {
    "a task that is none": {"task": "nope"},
    "one of Celery's own tasks": {"task": "celery.starmap"},
    "a task that is an object": {"task": {"a": 1}},
    "a task that is a list": {"task": ["x"]},
    "a task that is null": {"task": None},
    "an id that is an object": {"id": {"a": 1}},
    "an id that is a list": {"id": ["a"]},
    "no id": {"id": None},
    "a time limit that is a number": {"timelimit": 5},
    "a time limit of one number": {"timelimit": [5]},
    "an eta that is no time": {"eta": "tomorrow"},
    "an eta that is a number": {"eta": 1e18},
    "an expiry that is no time": {"expires": "never"},
    "an expiry that is an object": {"expires": {"a": 1}},
    "retries that are a text": {"retries": "x"},
    "arguments as an object": {"argsrepr": {"a": 1}},
    "a root that is a list": {"root_id": [1]},
    "stamps that are a text": {"stamps": "x", "stamped_headers": ["x"]},
    "a stamp that is missing": {"stamps": {}, "stamped_headers": ["x"]},
    "a header nested deep": {"x": DEEP},
    "half a character as the reason to refuse it": {WHY: "\ud800"},
    "half a character in a header": {"task": "\ud800", "origin": "\ud800"},
}


@pytest.mark.parametrize("headers", HEADERS.values(), ids=HEADERS.keys())
def test_headers_of_a_wrong_kind_are_refused_under_the_jobs_id(headers: dict[str, Any]) -> None:
    with pytest.raises(Malformed) as refused:
        opened(raw(**headers))
    assert refused.value.id == ID
    assert refused.value.why.encode()


PARTS = {
    "headers that are a list": {"headers": [1]},
    "no headers": {"headers": None},
    "a tag that is an object": {"properties": properties(delivery_tag={"a": 1})},
    "a tag that cannot be written": {"properties": properties(delivery_tag="\ud800")},
    "no tag": {"properties": {"delivery_info": {}}},
    "an address that is a text": {"properties": properties(delivery_info="x")},
    "properties that are a list": {"properties": [1]},
    "broken base64": {"properties": properties(body_encoding="base64")},
    "an encoding that is not known": {"properties": properties(body_encoding="rot13")},
    "a content type that is not known": {"content-type": "application/x-python-serialize"},
    "a content type that is a number": {"content-type": 5},
    "a character set that is not known": {"content-encoding": "klingon"},
    "half a character as a content type": {"content-type": "\ud800"},
    "half a character as a character set": {"content-encoding": "\ud800"},
    "half a character as an encoding": {"properties": properties(body_encoding="\ud800")},
}


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS.keys())
def test_a_message_that_kombu_cannot_make_is_refused_under_the_jobs_id(
    parts: dict[str, Any],
) -> None:
    with pytest.raises(Malformed) as refused:
        opened(raw() | parts)
    assert refused.value.id == ID
    assert refused.value.why.encode()


def test_a_refused_message_survives_being_handed_back() -> None:
    """Redis may be away when it is refused: it comes again, and still says why."""
    again = sound(sound(raw() | {"headers": [1]}, QUEUE), QUEUE)
    assert "headers" in again["headers"][WHY]
    assert again["headers"]["id"] == ID


@pytest.mark.parametrize("message", [[1, 2], 7, None, "text", True])
def test_what_is_no_message_at_all_is_dropped(message: Any) -> None:
    with pytest.raises(Malformed) as refused:
        sound(message, QUEUE)
    assert refused.value.id is None


def test_what_is_nested_as_deep_as_allowed_is_taken() -> None:
    inner: Any = "s3://photos/cat.jpg"
    for _ in range(MAX_DEPTH - 6):
        inner = [inner]
    assert opened(raw(json.dumps([[ID, {"image": inner}], {}, {}]))).headers["id"] == ID
