"""Notifications of uploads, in the forms that S3 and its relatives send."""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import unquote_plus


class Unreadable(ValueError):
    """A message that is no notification of S3."""


class Notification(NamedTuple):
    """An object that was put, by a notification. Whether it is there still, S3 knows."""

    bucket: str
    key: str
    version_id: str | None = None


def read(body: str) -> list[Notification]:
    """Uploads that a message notifies of; none for test events and other kinds of events.

    Takes S3's own records, EventBridge's, and either inside an SNS envelope. Raises Unreadable.
    """
    try:
        found = [_checked(each) for each in _uploads(_unwrapped(json.loads(body)))]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Unreadable(f"not a notification of S3: {type(error).__name__}: {error}") from None
    return found


def _checked(found: Notification) -> Notification:
    """Names that a request can hold: anybody may have written the message."""
    names = [found.bucket, found.key]
    names += [] if found.version_id is None else [found.version_id]
    for name in names:
        if not isinstance(name, str) or not name:
            raise TypeError("bucket, key and version must be texts")
        name.encode()  # half a character of UTF-16 has no UTF-8
    return found


def _unwrapped(event: Any) -> Any:
    if event.get("Type") == "Notification" and "Message" in event:  # through SNS
        return json.loads(event["Message"])
    return event


def _uploads(event: Any) -> Iterator[Notification]:
    if event.get("Event") == "s3:TestEvent":
        return
    if "detail-type" in event:
        if event["detail-type"] == "Object Created":
            yield _from_event_bridge(event["detail"])
        return
    for record in event["Records"]:
        # MinIO writes s3:ObjectCreated:Put, S3 itself ObjectCreated:Put.
        if record["eventName"].removeprefix("s3:").startswith("ObjectCreated:"):
            yield _from_record(record["s3"])


def _from_record(s3: Any) -> Notification:
    """In these records keys are URL-encoded, a space as a plus."""
    found = s3["object"]
    return Notification(
        s3["bucket"]["name"], unquote_plus(found["key"]), _version(found.get("versionId"))
    )


def _from_event_bridge(detail: Any) -> Notification:
    """Here keys are as they are."""
    found = detail["object"]
    return Notification(detail["bucket"]["name"], found["key"], _version(found.get("version-id")))


def _version(text: str | None) -> str | None:
    """``null`` is the version of objects from before versioning; no reference needs it."""
    return None if text in (None, "", "null") else text
