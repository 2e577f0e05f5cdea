"""Images at URLs: fetched through the guard, or a code that says why not, from real servers."""

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from blipq import Client, ErrorCode, ImageRef, InvalidRequest, Settings
from blipq.errors import PermanentError, TransientError, WorkError
from blipq.s3.storage import Storage
from blipq.ssrf.http import GuardedHttp
from blipq.ssrf.policy import Policy
from blipq_worker.images.fetch import Fetcher
from blipq_worker.images.https import HttpsFetcher
from hostile import HOSTILE_TEXTS, INSIDE, Names, self_signed

BYTES = bytes(range(256)) * 300
LOOPBACK = Policy(allow=("127.0.0.1",))
NOWHERE = Settings(redis_url="redis://127.0.0.1:1")


def fetcher(
    policy: Policy = LOOPBACK, *, max_bytes: int = 2**20, timeout_s: float = 5, **options: Any
) -> HttpsFetcher:
    return HttpsFetcher(GuardedHttp(policy, timeout_s=timeout_s, **options), max_bytes=max_bytes)


def refusal(fetcher: HttpsFetcher, uri: str, etag: str | None = None) -> WorkError:
    image = ImageRef.model_construct(uri=uri, version_id=None, etag=etag)
    with pytest.raises(WorkError) as raised:
        fetcher.fetch(image)
    return raised.value


def is_forbidden(error: WorkError) -> bool:
    return isinstance(error, PermanentError) and error.code is ErrorCode.URL_FORBIDDEN


def is_unavailable(error: WorkError) -> bool:
    return isinstance(error, TransientError) and error.code is ErrorCode.IMAGE_UNAVAILABLE


# --- the guard ------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", HOSTILE_TEXTS)
def test_a_hostile_text_is_refused_at_submit_and_never_connects(
    url: str, connects: list[Any]
) -> None:
    with Client(NOWHERE) as client, pytest.raises(InvalidRequest):
        client.caption(url)
    assert is_forbidden(refusal(fetcher(Policy(), resolve=Names(["127.0.0.1"])), url))
    assert connects == []


@pytest.mark.parametrize("host", INSIDE)
def test_an_address_inside_never_connects_however_it_is_written_or_named(
    host: str, connects: list[Any]
) -> None:
    address = host.strip("[]")
    for url, answer in (
        (f"https://{host}/a.jpg", [address]),
        ("https://example.org/a.jpg", [address]),
        ("https://example.org/a.jpg", ["8.8.8.8", address]),
    ):
        assert is_forbidden(refusal(fetcher(Policy(), resolve=Names(answer)), url))
    assert connects == []


def test_names_that_turn_inside_after_they_were_checked_never_connect_there(
    connects: list[Any],
) -> None:
    """DNS answers a public address first and 127.0.0.1 from then on."""
    names = Names(["93.184.216.34"], ["127.0.0.1"])
    rebound = fetcher(Policy(), resolve=names)
    assert is_unavailable(refusal(rebound, "https://rebinds.example/a.jpg"))
    assert is_forbidden(refusal(rebound, "https://rebinds.example/a.jpg"))
    assert connects == [("93.184.216.34", 443)]
    assert names.asked == 2


def test_a_listed_host_is_named_by_its_own_setting() -> None:
    with Client(NOWHERE) as client, pytest.raises(InvalidRequest, match="BLIPQ_IMAGE_ALLOW"):
        client.caption("http://10.0.0.1/a.jpg")
    with Client(NOWHERE) as client, pytest.raises(InvalidRequest, match="BLIPQ_IMAGE_PORTS"):
        client.caption("https://example.org:8443/a.jpg")


def test_a_version_is_for_s3_alone() -> None:
    with pytest.raises(ValueError, match="version_id is for s3://"):
        ImageRef(uri="https://example.org/a.jpg", version_id="1")


def test_a_worker_may_read_s3_alone(settings: Settings) -> None:
    s3_alone = Fetcher(Storage(settings), max_bytes=1, timeout_s=1)
    with pytest.raises(PermanentError, match="BLIPQ_HTTPS_IMAGES") as raised:
        s3_alone.fetch(ImageRef(uri="https://example.org/a.jpg"))
    assert raised.value.code is ErrorCode.URL_FORBIDDEN


# --- real servers ---------------------------------------------------------------------------------


def test_an_image_is_fetched_whole(httpserver: HTTPServer) -> None:
    httpserver.expect_request("/a.jpg").respond_with_data(BYTES)
    assert fetcher().fetch(ImageRef(uri=httpserver.url_for("/a.jpg?x=1"))) == BYTES
    ((request, _),) = httpserver.log
    assert request.query_string == b"x=1"
    assert request.headers["Accept-Encoding"] == "identity"
    assert request.headers["User-Agent"].startswith("blipq/")


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (401, ErrorCode.IMAGE_FORBIDDEN),
        (403, ErrorCode.IMAGE_FORBIDDEN),
        (451, ErrorCode.IMAGE_FORBIDDEN),
        (404, ErrorCode.IMAGE_NOT_FOUND),
        (410, ErrorCode.IMAGE_NOT_FOUND),
        (204, ErrorCode.IMAGE_FORBIDDEN),
        (304, ErrorCode.IMAGE_FORBIDDEN),
    ],
)
def test_a_refusal_is_final(httpserver: HTTPServer, status: int, code: ErrorCode) -> None:
    httpserver.expect_request("/a.jpg").respond_with_data(b"", status=status)
    error = refusal(fetcher(), httpserver.url_for("/a.jpg?signature=secret"))
    assert (type(error), error.code) == (PermanentError, code)
    assert f"HTTP {status}" in str(error)
    assert "secret" not in str(error)


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_server_in_trouble_may_pass_later(httpserver: HTTPServer, status: int) -> None:
    httpserver.expect_request("/a.jpg").respond_with_data(b"", status=status)
    assert is_unavailable(refusal(fetcher(), httpserver.url_for("/a.jpg")))


def test_a_name_without_an_address_and_a_closed_port_may_come_back() -> None:
    assert is_unavailable(refusal(fetcher(), "https://nothing.invalid/a.jpg"))
    assert is_unavailable(refusal(fetcher(), "http://127.0.0.1:1/a.jpg"))


def test_an_etag_is_checked(httpserver: HTTPServer) -> None:
    httpserver.expect_request("/a.jpg").respond_with_data(BYTES, headers={"ETag": 'W/"v1"'})
    httpserver.expect_request("/b.jpg").respond_with_data(BYTES)
    url = httpserver.url_for("/a.jpg")
    for same in ('"v1"', "v1", 'W/"v1"'):
        assert fetcher().fetch(ImageRef(uri=url, etag=same)) == BYTES
    for other, etag in ((url, '"v2"'), (httpserver.url_for("/b.jpg"), '"v1"')):
        error = refusal(fetcher(), other, etag)
        assert (type(error), error.code) == (PermanentError, ErrorCode.IMAGE_CHANGED)


def test_a_large_image_is_refused_by_its_header_or_while_it_streams(
    httpserver: HTTPServer,
) -> None:
    def streamed(_: Request) -> Response:
        return Response(iter([BYTES]))  # no length

    httpserver.expect_request("/told.jpg").respond_with_data(BYTES)
    httpserver.expect_request("/untold.jpg").respond_with_handler(streamed)
    for path in ("/told.jpg", "/untold.jpg"):
        url = httpserver.url_for(path)
        assert fetcher(max_bytes=len(BYTES)).fetch(ImageRef(uri=url)) == BYTES
        error = refusal(fetcher(max_bytes=len(BYTES) - 1), url)
        assert (type(error), error.code) == (PermanentError, ErrorCode.IMAGE_TOO_LARGE)


# --- redirects ------------------------------------------------------------------------------------


def _redirects(httpserver: HTTPServer, path: str, location: str) -> str:
    headers = {"Location": location}
    httpserver.expect_request(path).respond_with_data(b"", status=302, headers=headers)
    return httpserver.url_for(path)


def test_a_few_redirects_are_followed(httpserver: HTTPServer) -> None:
    httpserver.expect_request("/a.jpg").respond_with_data(BYTES)
    _redirects(httpserver, "/three", "/a.jpg")
    _redirects(httpserver, "/two", httpserver.url_for("/three"))
    first = _redirects(httpserver, "/one", "two")
    assert fetcher().fetch(ImageRef(uri=first)) == BYTES
    four = _redirects(httpserver, "/zero", "/one")
    error = refusal(fetcher(), four)
    assert is_forbidden(error)
    assert "more than 3 redirects" in str(error)


class Redirecting(BaseHTTPRequestHandler):
    """Redirects to ``location``, as it stands, and answers what comes from there."""

    location = b""
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        """One request."""
        if self.path != "/first":
            self.asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(BYTES)
            return
        self.wfile.write(b"HTTP/1.0 302 Found\r\nLocation: " + self.location + b"\r\n\r\n")

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


@pytest.mark.parametrize(
    ("location", "asked"),
    [
        (b"/my photo.jpg", "/my%20photo.jpg"),
        ("/\u00e9t\u00e9.jpg".encode(), "/%C3%A9t%C3%A9.jpg"),
        (b"/\xe9.jpg", "/%E9.jpg"),
        (b"/a%20b.jpg?x=%2B&y=a+b", "/a%20b.jpg?x=%2B&y=a+b"),
        (b"/a.jpg#top", "/a.jpg"),
    ],
)
def test_a_redirect_leads_where_a_browser_would_go(location: bytes, asked: str) -> None:
    """Servers write into Location what does not belong there: spaces, raw bytes, a fragment."""
    handler = type("Handler", (Redirecting,), {"location": location, "asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/first"
        assert fetcher().fetch(ImageRef(uri=url)) == BYTES
        server.shutdown()
    assert handler.asked == [asked]


@pytest.mark.parametrize(
    "location",
    [
        "http://10.0.0.1/",
        "http://169.254.169.254/latest/meta-data/",
        "https://[::1]/",
        "https://user@example.org/",
        "http://example.org/",
        "file:///etc/passwd",
        "gopher://127.0.0.1:6379/_FLUSHALL",
        "//10.0.0.1/",
        "https://inside.example/",
        "",
    ],
)
def test_a_redirect_meets_the_same_guard(httpserver: HTTPServer, location: str) -> None:
    url = _redirects(httpserver, "/a.jpg", location)
    error = refusal(fetcher(resolve=Names(["192.168.0.1"])), url)
    assert is_forbidden(error), error
    assert httpserver.log


@pytest.mark.parametrize(
    "location",
    [
        b"https://[",
        b"//[x]/",
        b"https://[::1",
        b"https://[v1.x]/",
        b"https://ex\xc3\xa4mple.org/",
        b"https://example%2eorg@10.0.0.1/",
        b"https://10.0.0.1%2f@example.org/",
        b"https://%31%30.0.0.1/",
        b"\\\\10.0.0.1\\a.jpg",
        b"https:\\\\10.0.0.1/",
        b"https://example.org\\@10.0.0.1/",
        b"data:image/png;base64,AAAA",
    ],
)
def test_a_redirect_to_what_parsers_disagree_about_is_refused(location: bytes) -> None:
    """With a code: what a stranger's server writes is no fault of the worker's."""
    handler = type("Handler", (Redirecting,), {"location": location, "asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/first"
        error = refusal(fetcher(resolve=Names(["192.168.0.1"])), url)
        server.shutdown()
    assert is_forbidden(error), error
    assert handler.asked == []


@pytest.mark.parametrize("location", [b"https://" + b"a." * 20_000, b"https://[" + b":" * 40_000])
def test_an_error_repeats_the_start_of_what_a_server_says(location: bytes) -> None:
    handler = type("Handler", (Redirecting,), {"location": location, "asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        error = refusal(fetcher(), f"http://127.0.0.1:{server.server_port}/first")
        server.shutdown()
    assert is_forbidden(error)
    assert len(str(error)) < 1000


def test_the_checked_address_is_met_under_the_name_of_the_url(tmp_path: Path) -> None:
    """TLS asks for the name's certificate, and Host is the name, at the address that was judged."""
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    self_signed(certificate, key, "photos.example")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with HTTPServer("127.0.0.1", ssl_context=context) as server:
        server.expect_request("/a.jpg").respond_with_data(BYTES)
        policy = Policy(allow=("127.0.0.0/8",), ports=(server.port,))
        trust = ssl.create_default_context(cafile=certificate)
        good = fetcher(policy, resolve=Names(["127.0.0.1"]), tls=trust)
        untrusting = fetcher(policy, resolve=Names(["127.0.0.1"]))
        uri = f"https://photos.example:{server.port}/a.jpg"
        assert good.fetch(ImageRef(uri=uri)) == BYTES
        assert server.log[0][0].headers["Host"] == f"photos.example:{server.port}"
        assert is_unavailable(refusal(good, uri.replace("photos", "other")))
        assert is_unavailable(refusal(untrusting, uri))
        assert len(server.log) == 1


# --- servers that misbehave -----------------------------------------------------------------------

Talk = Callable[[Callable[[socket.socket], object]], str]


@pytest.fixture
def talk() -> Iterator[Talk]:
    """A server for one connection, which does what it is given over and over; its URL."""
    threads: list[threading.Thread] = []
    over = threading.Event()

    def serve(listener: socket.socket, reply: Callable[[socket.socket], object]) -> None:
        with listener, listener.accept()[0] as peer:
            peer.recv(65536)
            try:
                while reply(peer) and not over.wait(0.02):
                    pass
            except OSError:
                pass

    def start(reply: Callable[[socket.socket], object]) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        listener.settimeout(10)
        threads.append(threading.Thread(target=serve, args=(listener, reply)))
        threads[-1].start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}/a.jpg"

    yield start
    over.set()
    for thread in threads:
        thread.join(10)


OK = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n"


def test_a_slow_drip_ends_with_the_deadline(talk: Talk) -> None:
    begun: list[bool] = []

    def drip(peer: socket.socket) -> bool:
        peer.sendall(b"x" if begun else OK % 100_000)
        begun.append(True)
        return True

    started = time.monotonic()
    error = refusal(fetcher(timeout_s=0.4), talk(drip))
    assert is_unavailable(error)
    assert "not read within 0.4 s" in str(error)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("reply", [OK % 100 + b"x" * 40, b"hello\r\n\r\n", b""])
def test_a_cut_connection_or_nonsense_may_pass_later(talk: Talk, reply: bytes) -> None:
    assert is_unavailable(refusal(fetcher(), talk(lambda peer: peer.sendall(reply))))


def test_an_error_repeats_the_start_of_what_is_no_http(talk: Talk) -> None:
    error = refusal(fetcher(), talk(lambda peer: peer.sendall(b"a." * 20_000 + b"\r\n\r\n")))
    assert is_unavailable(error)
    assert len(str(error)) < 1000


def test_many_threads_fetch_beside_each_other(httpserver: HTTPServer) -> None:
    httpserver.expect_request("/a.jpg").respond_with_data(BYTES)
    image = ImageRef(uri=httpserver.url_for("/a.jpg"))
    shared, got = fetcher(), []
    threads = [threading.Thread(target=lambda: got.append(shared.fetch(image))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert got == [BYTES] * 8
