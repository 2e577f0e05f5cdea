"""An object from S3, or why not: against the real S3, and against servers that misbehave."""

import hashlib
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

from blipq import ErrorCode, ImageRef, Settings
from blipq.errors import PermanentError, TransientError, WorkError
from blipq.s3.storage import Storage
from blipq_worker.images.fetch import Fetcher
from blipq_worker.images.s3_access import AccessRefused
from refusing_s3 import RefusingS3, refusing_s3

BYTES = bytes(range(256)) * 2000
OK = b'HTTP/1.1 200 OK\r\nContent-Length: %d\r\nETag: "x"\r\n\r\n'
ANYWHERE = ImageRef(uri="s3://bucket/key.png")
BEFORE = ImageRef(uri="s3://bucket/before.png")


@pytest.fixture(scope="module")
def storage(settings: Settings) -> Storage:
    return Storage(settings)


@pytest.fixture(scope="module")
def image(storage: Storage) -> ImageRef:
    return storage.upload(BYTES)


class Serving(Storage):
    """That of a bucket which has an object, ``BEFORE``, that is read before any other."""


def fetcher(storage: Storage, **options: object) -> Fetcher:
    made = Fetcher(storage, **{"max_bytes": 2**20, "timeout_s": 10.0, **options})  # type: ignore[arg-type]
    if isinstance(storage, Serving):  # within any time
        made._timeout_s, within = 10.0, made._timeout_s
        made.fetch(BEFORE)
        made._timeout_s = within
    return made


def refusal(fetcher: Fetcher, image: ImageRef) -> WorkError:
    with pytest.raises(WorkError) as raised:
        fetcher.fetch(image)
    return raised.value


def is_unavailable(error: WorkError) -> bool:
    return isinstance(error, TransientError) and error.code is ErrorCode.IMAGE_UNAVAILABLE


# --- the real S3 ----------------------------------------------------------------------------------


def test_an_object_is_fetched_whole(storage: Storage, image: ImageRef) -> None:
    assert fetcher(storage).fetch(image).data == BYTES


def test_an_object_of_just_the_allowed_size_is_fetched(storage: Storage, image: ImageRef) -> None:
    assert fetcher(storage, max_bytes=len(BYTES)).fetch(image).data == BYTES


def test_an_empty_object_is_fetched(storage: Storage) -> None:
    storage.put("s3://blipq-inbox/empty", b"", content_type="image/png")
    assert fetcher(storage).fetch(ImageRef(uri="s3://blipq-inbox/empty")).data == b""


@pytest.mark.parametrize("uri", ["s3://blipq-inbox/no/such.png", "s3://no-such-bucket-at-all/key"])
def test_a_missing_object_is_not_found(storage: Storage, uri: str) -> None:
    error = refusal(fetcher(storage), ImageRef(uri=uri))
    assert isinstance(error, PermanentError)
    assert error.code is ErrorCode.IMAGE_NOT_FOUND
    assert uri in str(error)


def test_a_wrong_secret_key_is_the_workers_fault(settings: Settings, image: ImageRef) -> None:
    fields = settings.model_dump() | {"s3_secret_access_key": "wrong"}
    error = refusal(fetcher(Storage(Settings.model_validate(fields))), image)
    assert isinstance(error, AccessRefused)
    assert "signature" in str(error)


def test_an_object_that_changed_is_told(storage: Storage, image: ImageRef) -> None:
    found = storage.client.head_object(Bucket=image.bucket, Key=image.key)
    pinned = image.model_copy(update={"etag": found["ETag"]})
    assert fetcher(storage).fetch(pinned).data == BYTES
    other = image.model_copy(update={"etag": '"0123456789abcdef0123456789abcdef"'})
    error = refusal(fetcher(storage), other)
    assert (type(error), error.code) == (PermanentError, ErrorCode.IMAGE_CHANGED)


def etag_of(storage: Storage, image: ImageRef) -> str:
    return storage.client.head_object(Bucket=image.bucket, Key=image.key)["ETag"]


def test_an_object_that_is_known_is_not_sent_again(storage: Storage, image: ImageRef) -> None:
    fetched = fetcher(storage).fetch(image)
    assert fetched.etag == etag_of(storage, image)
    assert fetcher(storage).fetch(image, unless=fetched.etag) is None
    assert fetcher(storage).fetch(image, unless='"another"').data == BYTES


def test_what_is_known_must_still_exist_and_be_readable(
    storage: Storage, settings: Settings, image: ImageRef
) -> None:
    etag = etag_of(storage, image)
    with pytest.raises(PermanentError) as caught:
        fetcher(storage).fetch(ImageRef(uri="s3://blipq-inbox/no/such.png"), unless=etag)
    assert caught.value.code is ErrorCode.IMAGE_NOT_FOUND
    fields = settings.model_dump() | {"s3_secret_access_key": "wrong"}
    with pytest.raises(AccessRefused):
        fetcher(Storage(Settings.model_validate(fields))).fetch(image, unless=etag)
    with pytest.raises(PermanentError) as caught:
        fetcher(storage, allowed_buckets=["other"]).fetch(image, unless=etag)
    assert caught.value.code is ErrorCode.IMAGE_FORBIDDEN


def test_a_large_object_is_refused_by_its_header(storage: Storage, image: ImageRef) -> None:
    error = refusal(fetcher(storage, max_bytes=len(BYTES) - 1), image)
    assert (type(error), error.code) == (PermanentError, ErrorCode.IMAGE_TOO_LARGE)
    assert f"larger than {len(BYTES) - 1:,} bytes" in str(error)


@pytest.mark.parametrize("allowed", ["blipq-inbox", "blipq-inbox/"])
def test_an_allowed_bucket_is_read(storage: Storage, image: ImageRef, allowed: str) -> None:
    assert fetcher(storage, allowed_buckets=["other", allowed]).fetch(image).data == BYTES


@pytest.mark.parametrize("allowed", ["blipq", "blipq-inbox-2", "blipq-inbox/private/"])
def test_another_bucket_is_forbidden_unread(
    storage: Storage, image: ImageRef, allowed: str
) -> None:
    error = refusal(fetcher(storage, allowed_buckets=[allowed]), image)
    assert (type(error), error.code) == (PermanentError, ErrorCode.IMAGE_FORBIDDEN)
    assert "BLIPQ_ALLOWED_BUCKETS" in str(error)


def test_an_upload_that_was_overwritten_is_not_read(storage: Storage) -> None:
    """Its name is the digest of what was uploaded."""
    victim = storage.upload(b"a picture that others upload, too")
    storage.put(victim.uri, b"another picture", content_type="image/png")
    error = refusal(fetcher(storage), victim)
    assert (type(error), error.code) == (PermanentError, ErrorCode.IMAGE_CHANGED)
    assert "upload the image again" in str(error)
    assert storage.upload(b"a picture that others upload, too") == victim
    assert fetcher(storage).fetch(victim).data == b"a picture that others upload, too"


def test_names_elsewhere_promise_nothing(storage: Storage) -> None:
    storage.create_bucket("photos")
    uri = f"s3://photos/{'0' * 64}.png"
    storage.put(uri, b"a picture", content_type="image/png")
    assert fetcher(storage).fetch(ImageRef(uri=uri)).data == b"a picture"


# --- parts ----------------------------------------------------------------------------------------


def part(storage: Storage, image: ImageRef, offset: int, length: int, **fields: str) -> ImageRef:
    pinned = {"etag": etag_of(storage, image), **fields}
    return ImageRef(uri=image.uri, offset=offset, length=length, **pinned)


@pytest.mark.parametrize(("offset", "length"), [(0, 1), (7, 1000), (len(BYTES) - 5, 5)])
def test_a_part_of_an_object_is_read_alone(
    storage: Storage, image: ImageRef, offset: int, length: int
) -> None:
    wanted = part(storage, image, offset, length)
    sizes: list[int] = []
    # The cap is on the part, not on what it lies in.
    found = fetcher(storage, max_bytes=1000).fetch(wanted, sized=sizes.append)
    assert found.data == BYTES[offset : offset + length]
    assert found.digest == hashlib.sha256(found.data).hexdigest()
    assert sizes == [length]
    assert fetcher(storage).fetch(wanted, unless=found.etag) is None


def test_a_part_that_is_too_long_is_refused_unread(image: ImageRef, storage: Storage) -> None:
    wanted = part(storage, image, 0, 1001)
    nowhere = Storage(Settings(s3_endpoint_url="http://127.0.0.1:1"))
    error = refusal(fetcher(nowhere, max_bytes=1000), wanted)
    assert (type(error), error.code) == (PermanentError, ErrorCode.IMAGE_TOO_LARGE)


@pytest.mark.parametrize("offset", [len(BYTES) - 5, len(BYTES), len(BYTES) + 10**6])
def test_a_part_that_reaches_behind_the_end_is_refused(
    storage: Storage, image: ImageRef, offset: int
) -> None:
    error = refusal(fetcher(storage), part(storage, image, offset, 10))
    assert (type(error), error.code) == (PermanentError, ErrorCode.INVALID_REQUEST)


def test_a_part_of_other_bytes_is_refused(storage: Storage, image: ImageRef) -> None:
    wanted = part(storage, image, 0, 10, etag='"0123456789abcdef0123456789abcdef"')
    error = refusal(fetcher(storage), wanted)
    assert (type(error), error.code) == (PermanentError, ErrorCode.IMAGE_CHANGED)


def test_a_part_is_read_from_allowed_buckets_alone(storage: Storage, image: ImageRef) -> None:
    error = refusal(fetcher(storage, allowed_buckets=["other"]), part(storage, image, 0, 10))
    assert error.code is ErrorCode.IMAGE_FORBIDDEN


# --- refusals -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3() -> Iterator[RefusingS3]:
    with refusing_s3() as server:
        yield server


@pytest.fixture(scope="module")
def refusing(s3: RefusingS3) -> Fetcher:
    return fetcher(Storage(s3.settings, attempts=1))


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, "RequestTimeout"),
        (400, "ThrottlingException"),
        (408, "RequestTimeout"),
        (409, "OperationAborted"),
        (429, "TooManyRequests"),
        (503, "SlowDown"),
        (403, "QuotaExceeded"),
        (507, "XMinioStorageFull"),
    ],
)
def test_a_store_that_is_busy_may_serve_later(
    s3: RefusingS3, refusing: Fetcher, status: int, code: str
) -> None:
    s3.refuse(status, code)
    error = refusal(refusing, ANYWHERE)
    assert is_unavailable(error)
    assert not isinstance(error, AccessRefused)


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, "ExpiredToken"),
        (400, "TokenRefreshRequired"),
        (400, "InvalidToken"),
        (400, "AuthorizationHeaderMalformed"),
        (403, "RequestTimeTooSkewed"),
        (403, "InvalidAccessKeyId"),
        (403, "AccessKeyDisabled"),
        (403, "AccountDisabled"),
        (403, "AllAccessDisabled"),
        (403, "NotSignedUp"),
    ],
)
def test_what_is_wrong_with_the_worker_is_not_the_jobs_fault(
    s3: RefusingS3, refusing: Fetcher, status: int, code: str
) -> None:
    s3.refuse(status, code)
    assert isinstance(refusal(refusing, ANYWHERE), AccessRefused)


def test_missing_credentials_are_not_the_jobs_fault(
    s3: RefusingS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", "/nonexistent")
    nobody = Settings(s3_endpoint_url=s3.settings.s3_endpoint_url)
    assert isinstance(refusal(fetcher(Storage(nobody)), ANYWHERE), AccessRefused)


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (403, "AccessDenied", "image_forbidden"),
        (403, "InvalidObjectState", "image_forbidden"),
        (400, "KMS.DisabledException", "image_forbidden"),
        (400, "InvalidRequest", "image_forbidden"),
        (400, "InvalidBucketName", "invalid_request"),
        (405, "MethodNotAllowed", "image_not_found"),
    ],
)
def test_what_no_later_try_can_read_fails_at_once(
    s3: RefusingS3, refusing: Fetcher, status: int, code: str, expected: str
) -> None:
    """An object's encryption is its owner's affair, not a fault of the request."""
    s3.refuse(status, code)
    error = refusal(refusing, ANYWHERE)
    assert (type(error), error.code) == (PermanentError, expected)
    assert f"told: {code}" in str(error)


# --- servers that misbehave -----------------------------------------------------------------------

Reply = Callable[[socket.socket], object]
Serve = Callable[..., Storage]


@pytest.fixture(params=[Storage, Serving], ids=["first", "next"])
def serve(request: pytest.FixtureRequest) -> Iterator[Serve]:
    """A one-trick HTTP server; gives the storage that asks it: for a first object, or the next."""
    over = threading.Event()

    def serve(reply: Reply, **options: Any) -> Storage:
        server = socket.create_server(("127.0.0.1", 0))
        server.settimeout(0.05)
        started.append(threading.Thread(target=_serve, args=(server, reply, over)))
        started[-1].start()
        port = server.getsockname()[1]
        settings = Settings(
            s3_endpoint_url=f"http://127.0.0.1:{port}",
            s3_access_key_id="key",
            s3_secret_access_key="secret",
        )
        return request.param(settings, read_timeout_s=0.3, **options)

    started: list[threading.Thread] = []
    yield serve
    over.set()
    for thread in started:
        thread.join()


def _serve(server: socket.socket, reply: Reply, over: threading.Event) -> None:
    with server:
        while not over.is_set():
            try:
                connection, _ = server.accept()
            except TimeoutError:
                continue
            with connection, suppress(OSError):
                if b"before.png" in connection.recv(65536):
                    connection.sendall(OK % 4 + b"else")
                    continue
                while reply(connection) and not over.wait(0.02):
                    pass


def test_the_length_is_told_before_the_bytes_come(serve: Serve) -> None:
    """Who waits for memory need not wait for the whole of a slow download."""
    told = threading.Event()

    def answer(connection: socket.socket) -> object:
        connection.sendall(OK % 100)
        told.wait(10)
        return connection.sendall(b"x" * 100) if told.is_set() else None

    lengths: list[int] = []

    def sized(length: int) -> None:
        lengths.append(length)
        told.set()

    assert fetcher(serve(answer)).fetch(ANYWHERE, sized=sized).data == b"x" * 100
    assert lengths == [100]


def test_a_slow_drip_ends_with_the_deadline(serve: Serve) -> None:
    """Each byte comes well within the read timeout; all of them would take for ever."""
    sent = threading.Event()

    def drip(connection: socket.socket) -> bool:
        if not sent.is_set():
            connection.sendall(OK % 100_000)
            sent.set()
        connection.sendall(b"x")
        return True

    error = refusal(fetcher(serve(drip), timeout_s=0.3), ANYWHERE)
    assert is_unavailable(error)
    assert "not read within 0.3 s" in str(error)


def test_a_cut_connection_may_pass_later(serve: Serve) -> None:
    error = refusal(fetcher(serve(lambda c: c.sendall(OK % 100 + b"x" * 40))), ANYWHERE)
    assert is_unavailable(error)


def test_a_server_that_stops_in_the_middle_may_pass_later(serve: Serve) -> None:
    def stop(connection: socket.socket) -> object:
        connection.sendall(OK % 100 + b"x" * 40)
        return connection.recv(1)

    assert is_unavailable(refusal(fetcher(serve(stop)), ANYWHERE))


def test_a_body_without_a_length_is_counted_while_it_streams(serve: Serve) -> None:
    """Some gateways send chunks; the cap must hold without a header to trust."""
    chunk = b"800\r\n" + b"x" * 2048 + b"\r\n"
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    storage = serve(lambda c: c.sendall(head + 4 * chunk + b"0\r\n\r\n"))
    assert fetcher(storage, max_bytes=8192).fetch(ANYWHERE).data == b"x" * 8192
    error = refusal(fetcher(storage, max_bytes=8191), ANYWHERE)
    assert error.code is ErrorCode.IMAGE_TOO_LARGE


def test_a_server_that_ignores_conditions_gives_no_other_bytes(serve: Serve) -> None:
    storage = serve(lambda c: c.sendall(OK % 4 + b"abcd"))
    assert fetcher(storage).fetch(ANYWHERE.model_copy(update={"etag": "x"})).data == b"abcd"
    error = refusal(fetcher(storage), ANYWHERE.model_copy(update={"etag": "y"}))
    assert (type(error), error.code) == (PermanentError, ErrorCode.IMAGE_CHANGED)


@pytest.mark.parametrize("status", [b"503 Slow Down", b"500 Internal Server Error"])
def test_a_server_in_trouble_may_pass_later(serve: Serve, status: bytes) -> None:
    storage = serve(lambda c: c.sendall(b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\n\r\n"))
    assert is_unavailable(refusal(fetcher(storage), ANYWHERE))


@pytest.mark.parametrize("attempts", [1, 2])
def test_a_server_that_falls_silent_is_waited_for_as_often_for_each_object(
    serve: Serve, attempts: int
) -> None:
    asked: list[socket.socket] = []

    def wait(connection: socket.socket) -> None:
        asked.append(connection)
        connection.recv(1)  # the end, when the other side has waited long enough

    assert is_unavailable(refusal(fetcher(serve(wait, attempts=attempts)), ANYWHERE))
    assert len(asked) == attempts


def test_a_server_that_talks_nonsense_may_pass_later(serve: Serve) -> None:
    assert is_unavailable(refusal(fetcher(serve(lambda c: c.sendall(b"hello\r\n"))), ANYWHERE))


def test_a_server_that_is_gone_may_come_back() -> None:
    nowhere = Settings(
        s3_endpoint_url="http://127.0.0.1:1", s3_access_key_id="k", s3_secret_access_key="s"
    )
    assert is_unavailable(refusal(fetcher(Storage(nowhere)), ANYWHERE))
