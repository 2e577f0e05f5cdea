"""Objects that are read without botocore's work for each: as it would, and by it where not."""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError, ConnectTimeoutError

from blipq import ImageRef, Settings
from blipq.errors import TransientError, WorkError
from blipq.s3.storage import Storage
from blipq_worker.images.fetch import Fetcher
from blipq_worker.images.objects import MOST_BUCKETS, Objects
from blipq_worker.images.s3_access import AccessRefused
from refusing_s3 import OBJECT, RefusingS3, refusing_s3

ANYWHERE = ImageRef(uri="s3://bucket/key.png")
ASKED = {"Bucket": "bucket", "Key": "key.png"}
BYTES = bytes(range(256)) * 50


class Counted:
    """How often botocore makes a whole call."""

    def __init__(self, storage: Storage) -> None:
        self.calls = 0
        storage.client.meta.events.register("before-call.s3.GetObject", self._called)

    def _called(self, **_: Any) -> None:
        self.calls += 1


def read(objects: Objects, **arguments: str) -> bytes | None:
    answer = objects.get(arguments)
    return answer.raw.read() if answer is not None else None


# --- the real S3 ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def storage(settings: Settings) -> Storage:
    storage = Storage(settings)
    storage.create_bucket("objects")
    storage.put("s3://objects/first", b"first", content_type="image/png")
    return storage


@pytest.fixture
def warm(settings: Settings, storage: Storage) -> tuple[Objects, Counted]:
    """What has read an object of the bucket before."""
    apart = Storage(settings)
    objects, counted = Objects(apart), Counted(apart)
    assert read(objects, Bucket="objects", Key="first") == b"first"
    assert counted.calls == 1
    return objects, counted


@pytest.mark.parametrize(
    "key", ["a.jpg", "a b/ü+&=?#%25@:,;!$'()*~-_.jpg", "with//two/.dots../x", "ä" * 100]
)
def test_the_second_object_of_a_bucket_costs_botocore_nothing(
    storage: Storage, warm: tuple[Objects, Counted], key: str
) -> None:
    objects, counted = warm
    storage.client.put_object(Bucket="objects", Key=key, Body=key.encode())
    assert read(objects, Bucket="objects", Key=key) == key.encode()
    assert counted.calls == 1


def test_conditions_and_parts_are_what_botocore_would_ask_for(
    storage: Storage, warm: tuple[Objects, Counted]
) -> None:
    objects, counted = warm
    which = {"Bucket": "objects", "Key": "parts"}
    etag = storage.client.put_object(**which, Body=BYTES, ContentEncoding="gzip")["ETag"]  # type: ignore[arg-type]
    part = objects.get({**which, "Range": "bytes=7-106", "IfMatch": etag})
    assert part is not None
    assert (part.length, part.etag, part.part) == (100, etag, f"bytes 7-106/{len(BYTES)}")
    assert part.raw.read() == BYTES[7:107]
    whole = objects.get({**which, "IfNoneMatch": '"another"'})
    assert whole is not None
    assert (whole.length, whole.coding, whole.raw.read()) == (len(BYTES), "gzip", BYTES)
    assert objects.get({**which, "IfNoneMatch": etag}) is None
    assert counted.calls == 1
    with pytest.raises(ClientError, match="PreconditionFailed"):
        objects.get({**which, "IfMatch": '"another"'})


def test_a_version_is_read_and_another_one_is_not(
    storage: Storage, warm: tuple[Objects, Counted]
) -> None:
    objects, counted = warm
    storage.create_bucket("versions")
    storage.client.put_bucket_versioning(
        Bucket="versions", VersioningConfiguration={"Status": "Enabled"}
    )
    ids = [
        storage.client.put_object(Bucket="versions", Key="a+b", Body=body)["VersionId"]
        for body in (b"old", b"new")
    ]
    for _ in range(2):
        found = [read(objects, Bucket="versions", Key="a+b", VersionId=id) for id in ids]
        assert found == [b"old", b"new"]
    assert read(objects, Bucket="versions", Key="a+b") == b"new"
    assert counted.calls == 2


def test_what_is_missing_is_botocores_to_say(warm: tuple[Objects, Counted]) -> None:
    objects, counted = warm
    with pytest.raises(ClientError, match="NoSuchKey"):
        objects.get({"Bucket": "objects", "Key": "no/such"})
    assert counted.calls == 2
    for _ in range(3):
        assert read(objects, Bucket="objects", Key="first") == b"first"
    assert counted.calls == 2  # the other objects are there: the bucket is not forgotten


def test_a_connection_serves_one_object_after_the_other(
    settings: Settings, storage: Storage
) -> None:
    """Not modified is an answer without a body, after which there may be another."""
    objects = Objects(Storage(settings))
    read(objects, Bucket="objects", Key="first")
    first = objects.get({"Bucket": "objects", "Key": "first"})
    assert first is not None
    pool, etag = first.raw._pool, first.etag
    assert first.raw.read() == b"first"
    for _ in range(3):
        assert objects.get({"Bucket": "objects", "Key": "first", "IfNoneMatch": etag}) is None
        assert read(objects, Bucket="objects", Key="first") == b"first"
    assert pool.num_connections == 1


def test_threads_read_what_they_ask_for(settings: Settings, storage: Storage) -> None:
    objects = Objects(Storage(settings))
    names = [f"{n}" for n in range(64)]
    for bucket in ("objects", "objects-2"):
        storage.create_bucket(bucket)
        for each in names:
            storage.put(f"s3://{bucket}/{each}", f"{bucket} {each}".encode(), content_type="a/b")
    work = [(bucket, each) for each in names for bucket in ("objects", "objects-2")]
    with ThreadPoolExecutor(16) as threads:
        found = list(threads.map(lambda w: read(objects, Bucket=w[0], Key=w[1]), work))
    assert found == [f"{bucket} {each}".encode() for bucket, each in work]


# --- refusals -------------------------------------------------------------------------------------


@pytest.fixture
def s3() -> Iterator[RefusingS3]:
    with refusing_s3() as server:
        yield server


def warmed(storage: Storage, **options: Any) -> Fetcher:
    fetcher = Fetcher(storage, **{"max_bytes": 2**20, "timeout_s": 10.0, **options})
    fetcher.fetch(ANYWHERE)
    return fetcher


def refusal(fetcher: Fetcher, image: ImageRef = ANYWHERE) -> WorkError:
    with pytest.raises(WorkError) as raised:
        fetcher.fetch(image)
    return raised.value


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, "ThrottlingException"),
        (503, "SlowDown"),
        (507, "XMinioStorageFull"),
        (400, "ExpiredToken"),
        (403, "InvalidAccessKeyId"),
        (403, "AllAccessDisabled"),
        (403, "AccessDenied"),
        (403, "InvalidObjectState"),
        (400, "KMS.DisabledException"),
        (400, "InvalidRequest"),
        (400, "InvalidBucketName"),
        (404, "NoSuchKey"),
        (404, "NoSuchBucket"),
        (405, "MethodNotAllowed"),
        (412, "PreconditionFailed"),
        (416, "InvalidRange"),
        (301, "PermanentRedirect"),
        (302, ""),
        (418, "Teapot"),
    ],
)
def test_a_refusal_is_the_same_for_the_first_object_and_for_the_next(
    s3: RefusingS3, status: int, code: str
) -> None:
    cold = Fetcher(Storage(s3.settings, attempts=1), max_bytes=2**20, timeout_s=10)
    next_one = warmed(Storage(s3.settings, attempts=1))
    s3.refuse(status, code)
    first, second = refusal(cold), refusal(next_one)
    assert (type(second), second.code, str(second)) == (type(first), first.code, str(first))
    if isinstance(first, AccessRefused):
        assert isinstance(second, AccessRefused)
        assert second.lasting == first.lasting


def test_a_store_that_was_busy_once_serves_the_object(s3: RefusingS3) -> None:
    fetcher = warmed(Storage(s3.settings))
    s3.refuse(503, "SlowDown", times=1)
    assert fetcher.fetch(ANYWHERE).data == OBJECT


def test_a_store_that_stays_down_is_asked_as_before(s3: RefusingS3) -> None:
    """Only the first failure of a bucket that has served costs one more request."""
    fetcher = warmed(Storage(s3.settings, attempts=1))
    s3.refuse(503, "SlowDown")
    s3.requests.clear()
    for _ in range(3):
        refusal(fetcher)
    assert len(s3.requests) == 1 + 3


def test_a_bucket_that_moves_to_another_region_is_followed(s3: RefusingS3) -> None:
    fetcher = warmed(Storage(s3.settings))
    s3.region = "eu-central-1"
    s3.refuse(301, "PermanentRedirect", times=2)
    for _ in range(3):
        assert fetcher.fetch(ANYWHERE).data == OBJECT
    regions = [each.split("/")[2] for each in s3.signed]
    assert regions == ["us-east-1"] * 3 + ["eu-central-1"] * 3


def test_not_modified_is_an_answer_to_who_asked_for_it_alone(s3: RefusingS3) -> None:
    fetcher = warmed(Storage(s3.settings, attempts=1))
    s3.refuse(304, "")
    assert fetcher.fetch(ANYWHERE, unless='"e"') is None
    s3.refuse(304, "")
    assert isinstance(refusal(fetcher), TransientError)


def test_as_many_buckets_are_remembered_as_may_be(s3: RefusingS3) -> None:
    objects = Objects(Storage(s3.settings))
    for n in range(MOST_BUCKETS // 100):
        read(objects, Bucket=f"bucket-{n}", Key="a")
    known = objects._known
    known.update({f"old-{n}": known["bucket-0"] for n in range(MOST_BUCKETS)})
    read(objects, Bucket="another", Key="a")
    assert set(known) == {"another"}


# --- credentials ----------------------------------------------------------------------------------


def test_credentials_that_run_out_are_renewed(
    s3: RefusingS3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A profile's process gives keys for a while; each run gives others."""
    program = tmp_path / "keys.py"
    program.write_text(KEYS.format(count=str(tmp_path / "count")))
    config = tmp_path / "config"
    config.write_text(
        f"[profile p]\nregion = eu-west-3\ncredential_process = {sys.executable} {program}\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_PROFILE", "p")
    fetcher = warmed(Storage(Settings(s3_endpoint_url=s3.settings.s3_endpoint_url)))
    for _ in range(2):
        fetcher.fetch(ANYWHERE)
    keys = [each.split("Credential=")[1].split("/")[0] for each in s3.signed]
    assert len(set(keys)) == 3, keys
    assert s3.tokens == [f"token of {each}" for each in keys]


def test_credentials_that_cannot_be_had_are_asked_for_once(
    s3: RefusingS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who gives them may be a server that does not answer, either."""
    fetcher = warmed(Storage(s3.settings))
    asked: list[object] = []

    def sign(*request: object) -> None:
        asked.append(request)
        raise ConnectTimeoutError(endpoint_url="https://sts.amazonaws.com")

    monkeypatch.setattr(fetcher._objects._signer, "sign", sign)
    assert isinstance(refusal(fetcher), TransientError)
    assert len(asked) == 1


#: Counts its runs in a file. What it gives is renewed at each use: it ends in a few minutes.
KEYS = """
import datetime, json, pathlib
count = pathlib.Path({count!r})
run = len(count.read_text()) if count.exists() else 0
count.write_text("x" * (run + 1))
until = datetime.datetime.now(datetime.UTC) + datetime.timedelta(minutes=5)
print(json.dumps({{
    "Version": 1,
    "AccessKeyId": f"KEY{{run}}",
    "SecretAccessKey": "secret",
    "SessionToken": f"token of KEY{{run}}",
    "Expiration": until.isoformat(),
}}))
"""
