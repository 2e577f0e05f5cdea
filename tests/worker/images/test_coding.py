"""Images whose bodies are compressed, by a server on their way or by whoever stored them."""

import gzip
import zlib

import pytest
from pytest_httpserver import HTTPServer

from blipq import ErrorCode, ImageRef, Settings
from blipq.errors import PermanentError
from blipq.s3.storage import Storage
from blipq.ssrf.http import GuardedHttp
from blipq.ssrf.policy import Policy
from blipq_worker.images.fetch import Fetcher
from blipq_worker.images.https import HttpsFetcher

BYTES = bytes(range(256)) * 400
MOST = 2**20
CODINGS = [
    ("gzip", gzip.compress(BYTES)),
    ("x-gzip", gzip.compress(BYTES)),
    ("GZIP", gzip.compress(BYTES)),
    ("deflate", zlib.compress(BYTES)),
    ("gzip, aws-chunked", gzip.compress(BYTES)),
    ("deflate, gzip", gzip.compress(zlib.compress(BYTES))),
    ("identity", BYTES),
    ("gzip", BYTES),  # servers say so of what they have unpacked, too
]
WRONG = [
    ("br", BYTES, ErrorCode.IMAGE_INVALID, "'br' is not read"),
    ("zstd", BYTES, ErrorCode.IMAGE_INVALID, "'zstd' is not read"),
    ("gzip", gzip.compress(BYTES)[:-20], ErrorCode.IMAGE_INVALID, "are cut"),
    ("gzip", b"\x1f\x8b" + bytes(99), ErrorCode.IMAGE_INVALID, "is damaged"),
    ("gzip", gzip.compress(bytes(MOST + 1)), ErrorCode.IMAGE_TOO_LARGE, "1,048,576"),
]


@pytest.fixture(scope="module")
def storage(settings: Settings) -> Storage:
    return Storage(settings)


def stored(storage: Storage, coding: str, data: bytes) -> ImageRef:
    storage.client.put_object(Bucket="blipq-inbox", Key="coded", Body=data, ContentEncoding=coding)
    return ImageRef(uri="s3://blipq-inbox/coded")


def over_https() -> HttpsFetcher:
    http = GuardedHttp(Policy(allow=("localhost", "127.0.0.1")), timeout_s=10)
    return HttpsFetcher(http, max_bytes=MOST)


def served(httpserver: HTTPServer, coding: str, data: bytes) -> ImageRef:
    headers = {"Content-Encoding": coding}
    httpserver.expect_request("/coded").respond_with_data(data, headers=headers)
    return ImageRef(uri=httpserver.url_for("/coded"))


@pytest.mark.parametrize(("coding", "data"), CODINGS)
def test_an_object_is_read_without_its_coding(storage: Storage, coding: str, data: bytes) -> None:
    fetcher = Fetcher(storage, max_bytes=MOST, timeout_s=10)
    assert fetcher.fetch(stored(storage, coding, data)).data == BYTES


@pytest.mark.parametrize(("coding", "data"), CODINGS)
def test_an_image_of_a_server_is_read_without_its_coding(
    httpserver: HTTPServer, coding: str, data: bytes
) -> None:
    assert over_https().fetch(served(httpserver, coding, data)) == BYTES


@pytest.mark.parametrize(("coding", "data", "code", "told"), WRONG)
def test_another_coding_is_named_and_no_bomb_is_unpacked(
    storage: Storage, httpserver: HTTPServer, coding: str, data: bytes, code: ErrorCode, told: str
) -> None:
    fetcher = Fetcher(storage, max_bytes=MOST, timeout_s=10)
    with pytest.raises(PermanentError, match=told) as of_s3:
        fetcher.fetch(stored(storage, coding, data))
    with pytest.raises(PermanentError, match=told) as of_https:
        over_https().fetch(served(httpserver, coding, data))
    assert (of_s3.value.code, of_https.value.code) == (code, code)


def test_a_proxys_version_of_an_image_is_read(httpserver: HTTPServer) -> None:
    httpserver.expect_request("/small").respond_with_data(BYTES, status=203)
    assert over_https().fetch(ImageRef(uri=httpserver.url_for("/small"))) == BYTES
