"""Notifications in every shape they come in."""

import json
from typing import Any

import pytest

from blipq.watch.events import Notification, Unreadable, read


def record(key: str, event: str = "ObjectCreated:Put", **found: Any) -> dict[str, Any]:
    return {
        "eventVersion": "2.1",
        "eventSource": "aws:s3",
        "eventName": event,
        "s3": {"bucket": {"name": "photos"}, "object": {"key": key, "size": 1, **found}},
    }


def body(*records: dict[str, Any]) -> str:
    return json.dumps({"Records": list(records)})


def event_bridge(kind: str = "Object Created", **found: Any) -> dict[str, Any]:
    detail = {"bucket": {"name": "photos"}, "object": {"key": "a b+c.jpg", **found}}
    return {"version": "0", "detail-type": kind, "source": "aws.s3", "detail": detail}


def test_a_message_may_tell_of_many_uploads() -> None:
    assert read(body(record("a"), record("b", versionId="v1"))) == [
        Notification("photos", "a"),
        Notification("photos", "b", "v1"),
    ]


@pytest.mark.parametrize(
    ("encoded", "key"),
    [
        ("a+b%2Bc.jpg", "a b+c.jpg"),
        ("%C3%BC/1.jpg", "ü/1.jpg"),
        ("100%25.jpg", "100%.jpg"),
    ],
)
def test_keys_of_records_are_url_encoded(encoded: str, key: str) -> None:
    assert read(body(record(encoded))) == [Notification("photos", key)]


def test_keys_of_event_bridge_are_not() -> None:
    assert read(json.dumps(event_bridge(**{"version-id": "v1"}))) == [
        Notification("photos", "a b+c.jpg", "v1")
    ]


def test_an_sns_envelope_is_opened() -> None:
    for inner in (body(record("a")), json.dumps(event_bridge())):
        assert len(read(json.dumps({"Type": "Notification", "Message": inner}))) == 1


@pytest.mark.parametrize("name", ["s3:ObjectCreated:Put", "ObjectCreated:CompleteMultipartUpload"])
def test_every_way_to_create_counts(name: str) -> None:
    assert read(body(record("a", name))) == [Notification("photos", "a")]


def test_null_is_no_version() -> None:
    assert read(body(record("a", versionId="null"))) == [Notification("photos", "a")]


@pytest.mark.parametrize(
    "message",
    [
        {"Service": "Amazon S3", "Event": "s3:TestEvent", "Bucket": "photos"},
        {"Records": []},
        {"Records": [record("a", "ObjectRemoved:Delete"), record("a", "ObjectTagging:Put")]},
        event_bridge("Object Deleted"),
        event_bridge("Scheduled Event"),
    ],
)
def test_other_events_tell_of_no_upload(message: dict[str, Any]) -> None:
    assert read(json.dumps(message)) == []


@pytest.mark.parametrize(
    "text",
    ["", "hello", "[]", "null", "{}", '{"Records": 1}', '{"Records": [{}]}', '{"Records": ["x"]}',
     '{"Records": [{"eventName": "ObjectCreated:Put", "s3": {}}]}',
     '{"Type": "Notification", "Message": "hello"}', '{"detail-type": "Object Created"}'],
)  # fmt: skip
def test_what_is_no_notification_is_said_to_be_none(text: str) -> None:
    with pytest.raises(Unreadable, match="not a notification of S3"):
        read(text)


@pytest.mark.parametrize(
    ("bucket", "object_"),
    [
        ("photos", {"key": 5}),
        ("photos", {"key": ["a"]}),
        ("photos", {"key": ""}),
        ("photos", {"key": "\ud800"}),
        (["photos"], {"key": "a"}),
        ("photos", {"key": "a", "version-id": {"a": 1}}),
        ("photos", {"key": "a", "version-id": 7}),
    ],
)
def test_names_that_are_none_are_no_notification(bucket: Any, object_: dict[str, Any]) -> None:
    """They once ended the watch, and came again to the next."""
    detail = {"bucket": {"name": bucket}, "object": object_}
    with pytest.raises(Unreadable):
        read(json.dumps({"detail-type": "Object Created", "detail": detail}))


def test_what_is_nested_too_deep_is_no_notification() -> None:
    with pytest.raises(Unreadable):
        read('{"Records": ' + "[" * 100_000 + "]" * 100_000 + "}")
