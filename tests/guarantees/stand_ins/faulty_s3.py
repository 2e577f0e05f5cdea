"""Stands between workers and the real S3 server, and breaks downloads whose key says how.

``fault=503x2`` answers 503 to the first two requests for the key, and ``fault=503`` to all of them.
Faults: ``none``; an HTTP status; ``cut``, half of the body and then nothing; ``drip``, a byte at a
time; ``huge``, a 5 GB object; ``held``, a write that stays on its way until ``release`` is set.
Everything else passes through as it is: signatures cover the Host header, which is left alone.
"""

import http.client
import re
import threading
import time
from collections import Counter
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

FAULT = re.compile(r"fault=(?P<what>\w+?)(x(?P<times>\d+))?/")
DRIP_S = 0.05
HELD_S = 60.0
HUGE = 5 * 2**30


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A worker that was killed in the middle of a download is no news."""


class FaultyS3:
    """The server; ``url`` is what workers are given as their S3 endpoint."""

    def __init__(self, real_url: str) -> None:
        self.requests: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.release = threading.Event()
        self.held = 0
        #: A code of S3's that every download is refused with, while it is set.
        self.code: str | None = None
        #: What became of writes, in order.
        self.writes: list[int] = []
        self._real = urlsplit(real_url).netloc
        faulty = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 60

            def do_GET(self) -> None:
                faulty.answer(self)

            do_HEAD = do_PUT = do_GET

            def log_message(self, format: str, *args: object) -> None:
                """Quiet."""

        self._server = _QuietServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """One request, with its fault if it has one now."""
        self.requests[request.path] += 1
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        try:
            what = self.code if self.code and request.command == "GET" else None
            what = what or self._fault(request.path)
            if what is None:
                self._pass_on(request, body)
            elif what == "held":
                if request.command == "PUT":
                    self.held += 1
                    self.release.wait(HELD_S)
                self._pass_on(request, body)
            elif what.isdecimal():
                self._refuse(request, int(what))
            elif what[0].isupper():
                told = f"<Error><Code>{what}</Code><Message>{what}</Message></Error>"
                self._refuse(request, 400, told.encode())
            else:
                self._spoil(request, what)
        except OSError:
            request.close_connection = True  # its worker was killed

    def _fault(self, path: str) -> str | None:
        match = FAULT.search(path.replace("%3D", "="))
        if match is None or match["what"] == "none":
            return None
        times = int(match["times"] or 10**9)
        return match["what"] if self.requests[path] <= times else None

    def _pass_on(self, request: BaseHTTPRequestHandler, body: bytes) -> None:
        with closing(http.client.HTTPConnection(self._real, timeout=30)) as connection:
            connection.putrequest(
                request.command, request.path, skip_host=True, skip_accept_encoding=True
            )
            for name, value in request.headers.items():
                connection.putheader(name, value)
            connection.endheaders(body)
            response = connection.getresponse()
            data = response.read()
        if request.command == "PUT":
            self.writes.append(response.status)
        request.send_response(response.status)
        for name, value in response.getheaders():
            if name.lower() not in {"transfer-encoding", "content-length", "connection", "date"}:
                request.send_header(name, value)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)

    def _refuse(self, request: BaseHTTPRequestHandler, status: int, body: bytes = b"") -> None:
        request.send_response(status)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    def _spoil(self, request: BaseHTTPRequestHandler, what: str) -> None:
        length = HUGE if what == "huge" else 1000
        request.send_response(200)
        request.send_header("Content-Length", str(length))
        request.end_headers()
        if what == "cut":
            request.wfile.write(bytes(length // 2))
        elif what == "drip":
            for _ in range(length):
                request.wfile.write(b"x")
                request.wfile.flush()
                time.sleep(DRIP_S)
        else:
            while True:
                request.wfile.write(bytes(65536))
                self.sent[request.path] += 65536
        request.close_connection = True
        request.connection.close()
