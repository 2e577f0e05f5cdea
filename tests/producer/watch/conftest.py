"""Buckets of the real S3 server, and rules about them."""

from collections.abc import Callable
from typing import Any

import pytest

from blipq import Client
from blipq.watch.objects import Objects
from blipq.watch.rules import Rules


@pytest.fixture
def bucket(client: Client) -> str:
    """A bucket that is empty."""
    name = "watched-photos"
    s3 = client.storage.client
    client.storage.create_bucket(name)
    for found in s3.list_objects_v2(Bucket=name).get("Contents", ()):
        s3.delete_object(Bucket=name, Key=found["Key"])
    return name


@pytest.fixture
def objects(client: Client) -> Objects:
    return Objects(client.storage)


@pytest.fixture
def put(client: Client, bucket: str) -> Callable[..., None]:
    """Uploads an object."""

    def put(key: str, data: bytes = b"image", content_type: str = "image/jpeg") -> None:
        client.storage.client.put_object(
            Bucket=bucket, Key=key, Body=data, ContentType=content_type
        )

    return put


@pytest.fixture
def rules(bucket: str) -> Callable[..., Rules]:
    """Rules with one rule for the bucket, which keyword arguments change."""

    def make(source: dict[str, Any] | None = None, **rule: Any) -> Rules:
        rule = {"name": "captions", "bucket": bucket, "request": {"kind": "caption"}} | rule
        return Rules.model_validate({"name": "test", "source": source or {}, "rules": [rule]})

    return make
