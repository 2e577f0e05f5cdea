"""Images whose bodies are compressed, by a server on their way or by whoever stored them."""

import gzip
import sys
import zlib

import brotli
import pytest
from backports import zstd
from pytest_httpserver import HTTPServer

from blipq import ErrorCode, ImageRef, Settings
from blipq.errors import PermanentError
from blipq.s3.storage import Storage
from blipq.ssrf.http import GuardedHttp
from blipq.ssrf.policy import Policy
from blipq_worker.images.coding import plain
from blipq_worker.images.fetch import Fetcher
from blipq_worker.images.https import HttpsFetcher

BYTES = bytes(range(256)) * 400
MOST = 2**20
#: It has its reader keep 128 MiB.
_greedy = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 27})
GREEDY = _greedy.compress(BYTES) + _greedy.flush()
#: Frames that readers pass over: pzstd writes one in front of each other.
SKIPPED = b"\x50\x2a\x4d\x18\x04\0\0\0note"
HALVES = BYTES[:50_000], BYTES[50_000:]
CODINGS = [
    ("gzip", b"".join(map(gzip.compress, HALVES))),
    ("gzip", gzip.compress(BYTES) + bytes(500)),  # padded to a block
    ("zstd", b"".join(map(zstd.compress, HALVES))),
    ("zstd", SKIPPED + zstd.compress(BYTES) + SKIPPED),
    ("gzip", gzip.compress(BYTES)),
    ("x-gzip", gzip.compress(BYTES)),
    ("GZIP", gzip.compress(BYTES)),
    ("deflate", zlib.compress(BYTES)),
    ("gzip, aws-chunked", gzip.compress(BYTES)),
    ("deflate, gzip", gzip.compress(zlib.compress(BYTES))),
    ("identity", BYTES),
    ("gzip", BYTES),  # servers say so of what they have unpacked, too
    ("br", brotli.compress(BYTES)),
    ("zstd", zstd.compress(BYTES)),
    ("zstd", BYTES),
    ("zstd, br", brotli.compress(zstd.compress(BYTES))),
]
WRONG = [
    ("gzip", gzip.compress(BYTES) + b"more", ErrorCode.IMAGE_INVALID, "is damaged"),
    ("gzip", gzip.compress(BYTES) * 2 + b"\x1f\x8b", ErrorCode.IMAGE_INVALID, "are cut"),
    ("gzip", gzip.compress(bytes(MOST)) * 2, ErrorCode.IMAGE_TOO_LARGE, "1,048,576"),
    ("gzip", gzip.compress(b"") * 300, ErrorCode.IMAGE_INVALID, "more than 256 parts"),
    ("deflate", zlib.compress(BYTES) + b"more", ErrorCode.IMAGE_INVALID, "is damaged"),
    ("br", brotli.compress(BYTES) * 2, ErrorCode.IMAGE_INVALID, "is damaged"),
    ("zstd", zstd.compress(BYTES) + b"more", ErrorCode.IMAGE_INVALID, "is damaged"),
    ("zstd", zstd.compress(bytes(MOST)) * 2, ErrorCode.IMAGE_TOO_LARGE, "1,048,576"),
    ("compress", BYTES, ErrorCode.IMAGE_INVALID, "'compress' is not read"),
    ("br", b"no brotli at all", ErrorCode.IMAGE_INVALID, "is damaged"),
    ("br", brotli.compress(BYTES)[:-20], ErrorCode.IMAGE_INVALID, "are cut"),
    ("br", brotli.compress(bytes(200 * MOST)), ErrorCode.IMAGE_TOO_LARGE, "1,048,576"),
    ("zstd", zstd.compress(BYTES)[:-20], ErrorCode.IMAGE_INVALID, "are cut"),
    ("zstd", b"\x28\xb5\x2f\xfd" + bytes([255] * 99), ErrorCode.IMAGE_INVALID, "is damaged"),
    ("zstd", zstd.compress(bytes(200 * MOST)), ErrorCode.IMAGE_TOO_LARGE, "1,048,576"),
    ("zstd", GREEDY, ErrorCode.IMAGE_INVALID, "is damaged.*memory"),
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


@pytest.mark.parametrize(
    ("coding", "data", "module", "package"),
    [
        ("br", brotli.compress(BYTES), "brotli", "brotli"),
        ("zstd", zstd.compress(BYTES), "backports", "backports.zstd"),
    ],
)
def test_a_coding_without_its_package_names_it(
    monkeypatch: pytest.MonkeyPatch, coding: str, data: bytes, module: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # no such package
    with pytest.raises(PermanentError, match=f"pip install '{package}") as raised:
        plain(data, coding, MOST)
    assert raised.value.code is ErrorCode.IMAGE_INVALID


def test_a_brotli_that_cannot_stop_at_a_size_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 1.2 ``process`` takes the data alone, and a bomb would be unpacked whole."""

    class Earlier:
        def process(self, data: bytes) -> bytes:
            return brotli.decompress(data)

    monkeypatch.setattr(brotli, "Decompressor", Earlier)
    with pytest.raises(PermanentError, match=r"pip install 'brotli>=1\.2'") as raised:
        plain(brotli.compress(BYTES), "br", MOST)
    assert raised.value.code is ErrorCode.IMAGE_INVALID


def test_a_proxys_version_of_an_image_is_read(httpserver: HTTPServer) -> None:
    httpserver.expect_request("/small").respond_with_data(BYTES, status=203)
    assert over_https().fetch(ImageRef(uri=httpserver.url_for("/small"))) == BYTES
