"""Uploads to a real S3."""

import hashlib
import os
import socket
import time
import tracemalloc
import urllib.request
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from blipq import InvalidRequest, QueueUnavailable, Settings
from blipq.s3.refusals import Refusal, S3Refused
from blipq.s3.storage import MAX_UPLOAD_BYTES, Storage, told_at
from refusing_s3 import refusing_s3


@pytest.fixture
def storage(apart: Settings) -> Storage:
    return Storage(apart)


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_file_is_uploaded_under_the_hash_of_its_content(storage: Storage, tmp_path: Path) -> None:
    path = tmp_path / "Cat.PNG"
    path.write_bytes(b"a cat")
    image = storage.upload(path)
    assert image.key == hashlib.sha256(b"a cat").hexdigest() + ".png"
    found = storage.client.get_object(Bucket=image.bucket, Key=image.key)
    assert (found["Body"].read(), found["ContentType"]) == (b"a cat", "image/png")


def test_the_same_bytes_are_stored_once(storage: Storage) -> None:
    first = storage.upload(b"twice")
    stored = storage.client.head_object(Bucket=first.bucket, Key=first.key)["LastModified"]
    assert storage.upload(b"twice") == first
    again = storage.client.head_object(Bucket=first.bucket, Key=first.key)["LastModified"]
    assert again == stored


@pytest.fixture
def writes(storage: Storage) -> list[str]:
    """The keys of the objects that are written, in order, whatever the server makes of them."""
    keys: list[str] = []
    storage.client.meta.events.register(
        "provide-client-params.s3.PutObject", lambda params, **_: keys.append(params["Key"])
    )
    return keys


def test_an_upload_that_is_half_as_old_as_the_inbox_lets_it_be_is_written_anew(
    storage: Storage, writes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the lifecycle rule could delete it while the job of the second upload waits."""
    image = storage.upload(b"uploaded now and then")
    passed = timedelta()
    monkeypatch.setattr("blipq.s3.storage.told_at", lambda answer: told_at(answer) + passed)
    for days, expected in ((6.9, 1), (7.1, 2)):  # of 14; the first write is refused: it is there
        passed = timedelta(days=days)
        writes.clear()
        assert storage.upload(b"uploaded now and then") == image
        assert writes == [image.key] * expected
    found = storage.client.get_object(Bucket=image.bucket, Key=image.key)["Body"].read()
    assert found == b"uploaded now and then"


@pytest.mark.parametrize("spoiled", [b"A CAT", b"a longer cat"])
def test_an_upload_whose_object_was_overwritten_is_written_anew(
    storage: Storage, spoiled: bytes
) -> None:
    """As the worker advises where the digest is not that of the name; also at the same size."""
    image = storage.upload(b"a cat")
    where = {"Bucket": image.bucket, "Key": image.key}
    storage.client.put_object(**where, Body=spoiled)  # type: ignore[arg-type]
    assert storage.upload(b"a cat") == image
    assert storage.client.get_object(**where)["Body"].read() == b"a cat"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("etag", "requests"),
    [
        (hashlib.md5(b"this many bytes long").hexdigest(), ["PUT", "HEAD"]),
        (hashlib.md5(b"others, not that long").hexdigest(), ["PUT", "HEAD", "PUT"]),
        (hashlib.md5(b"parts").hexdigest() + "-2", ["PUT", "HEAD"]),
    ],
)
def test_an_etag_tells_other_bytes_where_it_is_an_md5(etag: str, requests: list[str]) -> None:
    with refusing_s3() as s3:
        s3.script, s3.etag = [(412, "PreconditionFailed")], f'"{etag}"'
        Storage(s3.settings, attempts=1).upload(b"this many bytes long")
        assert s3.requests == requests


def test_an_upload_that_cannot_be_looked_at_is_written_anew() -> None:
    """A producer that may only write does not know how old it is."""
    with refusing_s3() as s3:
        s3.script = [(412, "PreconditionFailed"), (403, ""), None]
        Storage(s3.settings, attempts=1).upload(b"a cat")
        assert s3.requests == ["PUT", "HEAD", "PUT"]


def test_a_conflict_with_another_upload_does_not_say_that_it_is_there() -> None:
    with refusing_s3() as s3:
        s3.refuse(409, "ConditionalRequestConflict")
        with pytest.raises(QueueUnavailable, match="ConditionalRequestConflict"):
            Storage(s3.settings, attempts=1).upload(b"a cat")


def test_a_path_may_be_text(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"as text")
    assert storage.upload(str(tmp_path / "a.jpg")).key.endswith(".jpg")


def test_an_object_is_written_and_read(storage: Storage) -> None:
    storage.put("s3://blipq-inbox/results/1.json", b"{}", content_type="application/json")
    with urllib.request.urlopen(storage.presign("s3://blipq-inbox/results/1.json")) as response:
        assert response.read() == b"{}"


def test_a_bucket_may_exist_already(storage: Storage) -> None:
    storage.create_bucket("blipq-inbox")
    storage.create_bucket("blipq-inbox")


def test_a_file_that_is_not_there_is_told(storage: Storage, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"cannot read .*gone\.png: No such file"):
        storage.upload(tmp_path / "gone.png")


def test_a_folder_is_no_image_and_the_error_says_what_takes_it(
    storage: Storage, tmp_path: Path
) -> None:
    folder = tmp_path / "my photos"
    folder.mkdir()
    with pytest.raises(InvalidRequest) as told:
        storage.upload(folder)
    command = f"blipq bulk submit '{folder}'"
    assert str(told.value) == f"{folder} is a folder: {command} takes the images in it"


@pytest.mark.parametrize(
    "path", ["a\0b.png", "\udcff.png", "x" * 5000, f"data:image/png;base64,{'iVBOR' * 2000}"]
)
def test_a_path_that_cannot_be_is_told(storage: Storage, path: str) -> None:
    with pytest.raises(InvalidRequest, match="cannot read") as told:
        storage.upload(path)
    assert len(str(told.value)) < 300


def test_an_empty_file_is_refused(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    with pytest.raises(InvalidRequest, match=r"empty\.png is empty"):
        storage.upload(tmp_path / "empty.png")


def test_a_huge_file_is_refused(storage: Storage, tmp_path: Path) -> None:
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(MAX_UPLOAD_BYTES + 1)
    with pytest.raises(InvalidRequest, match=r"huge\.png is too large: the most is 67,108,864"):
        storage.upload(tmp_path / "huge.png")


def test_bytes_are_refused_beyond_the_size_of_a_file(storage: Storage) -> None:
    with pytest.raises(InvalidRequest, match="the image is too large: the most is 67,108,864"):
        storage.upload(bytes(MAX_UPLOAD_BYTES + 1))


def test_a_device_without_an_end_is_refused_within_the_same_size(storage: Storage) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(InvalidRequest, match="/dev/zero is too large"):
            storage.upload("/dev/zero")
        assert tracemalloc.get_traced_memory()[1] < 3 * MAX_UPLOAD_BYTES
    finally:
        tracemalloc.stop()


def test_a_pipe_is_uploaded(storage: Storage) -> None:
    """As a shell's ``blipq caption <(curl ...)`` hands one on."""
    end, start = os.pipe()
    with os.fdopen(start, "wb") as pipe:
        pipe.write(b"a piped cat")
    try:
        image = storage.upload(f"/dev/fd/{end}")
    finally:
        os.close(end)
    assert image.key == hashlib.sha256(b"a piped cat").hexdigest()


def test_a_wrong_secret_key_is_told(apart: Settings) -> None:
    fields = apart.model_dump() | {"s3_secret_access_key": "wrong"}
    with pytest.raises(InvalidRequest, match=r"S3 refuses.*SignatureDoesNotMatch"):
        Storage(Settings.model_validate(fields)).upload(b"a cat")


def test_missing_credentials_are_told(apart: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", "/nonexistent")
    anonymous = Settings(s3_endpoint_url=apart.s3_endpoint_url)
    with pytest.raises(InvalidRequest, match="BLIPQ_S3_ACCESS_KEY_ID"):
        Storage(anonymous).upload(b"a cat")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AWS_ENDPOINT_URL_S3", "localhost:9000"),
        ("AWS_ENDPOINT_URL", "ftp://localhost"),
        ("AWS_PROFILE", "nope"),
    ],
)
def test_a_wrong_setting_of_awss_own_is_told(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    storage = Storage(Settings(redis_url="redis://127.0.0.1:1/0"))
    for act in (
        lambda: storage.upload(b"a cat"),
        lambda: storage.has_bucket("photos"),
        lambda: storage.presign("s3://photos/cat.jpg"),
        storage.check_configuration,
    ):
        with pytest.raises(S3Refused, match="s3 is configured wrongly") as raised:
            act()
        assert raised.value.refusal is Refusal.ACCESS


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_an_endpoint_that_redirects_everything_is_refused_access(status: int) -> None:
    """As a proxy that wants https. botocore asked for the bucket's region until the stack ended."""
    with refusing_s3() as s3:
        storage = Storage(s3.settings, attempts=1)
        for code in ("", "PermanentRedirect"):
            s3.refuse(status, code)
            for act in (
                lambda: storage.upload(b"a cat"),
                lambda: storage.head("photos", "cat.jpg"),
                lambda: storage.has_bucket("photos"),
            ):
                s3.requests.clear()
                with pytest.raises(S3Refused) as raised:
                    act()
                assert raised.value.refusal is Refusal.ACCESS
                assert len(s3.requests) <= 2
            assert storage.refused_access() is not None


def test_a_bucket_in_another_region_is_followed_there() -> None:
    """S3 names the region where it redirects."""
    with refusing_s3() as s3:
        s3.script = [(301, "PermanentRedirect"), None]
        s3.region = "eu-north-1"
        assert Storage(s3.settings, attempts=1).head("photos", "cat.jpg") is not None
        assert s3.requests == ["HEAD", "HEAD"]


def test_an_s3_that_is_down_is_an_unavailable_queue(apart: Settings) -> None:
    nowhere = apart.model_copy(update={"s3_endpoint_url": "http://127.0.0.1:1"})
    started = time.monotonic()
    with pytest.raises(QueueUnavailable, match="S3 does not answer"):
        Storage(nowhere).upload(b"a cat")
    assert time.monotonic() - started < 10


def test_a_silent_s3_is_given_up(apart: Settings, silent_port: int) -> None:
    silent = apart.model_copy(update={"s3_endpoint_url": f"http://127.0.0.1:{silent_port}"})
    with pytest.raises(QueueUnavailable, match="S3 does not answer"):
        Storage(silent, read_timeout_s=0.1).upload(b"a cat")
