"""An S3 that refuses as AWS and others do: the status, the code, and HEAD without a body.

What is posted is refused as STS and SQS refuse.
"""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from blipq import Settings

OBJECT = b"every key holds this"


class RefusingS3:
    """Refuses what ``refuse`` says; else every key holds an object, and every write succeeds.

    ``requests`` are the methods of the requests so far.
    """

    def __init__(self) -> None:
        self.requests: list[str] = []
        #: What signs them, and the token that goes with it.
        self.signed: list[str] = []
        self.tokens: list[str | None] = []
        #: What the next requests are answered, before anything else; None is no refusal.
        self.script: list[tuple[int, str] | None] = []
        #: The ETag of every object.
        self.etag = '"e"'
        #: The bucket's region, told with every refusal.
        self.region: str | None = None
        self._refusal: tuple[int, str] | None = None
        self._times = 0
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 30

            def do_GET(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                stub.requests.append(self.command)
                stub.signed.append(self.headers.get("Authorization", ""))
                stub.tokens.append(self.headers.get("X-Amz-Security-Token"))
                in_json = "X-Amz-Target" in self.headers
                self._reply(*stub._answer(self.command, in_json=in_json))

            do_HEAD = do_PUT = do_POST = do_GET

            def _reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                """Quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def settings(self) -> Settings:
        """How to reach it; nothing else is there."""
        return Settings(
            redis_url="redis://127.0.0.1:1/0",
            s3_endpoint_url=f"http://127.0.0.1:{self._server.server_port}",
            s3_access_key_id="key",
            s3_secret_access_key="secret",  # type: ignore[arg-type]
        )

    def refuse(self, status: int, code: str, *, times: int = 10**9) -> None:
        """Answers so to the next requests."""
        self._refusal, self._times = (status, code), times

    def _answer(self, method: str, *, in_json: bool) -> tuple[int, bytes, dict[str, str]]:
        refusal = self.script.pop(0) if self.script else self._next()
        if refusal is not None:
            status, code = refusal
            body, kind = _told(method, code, in_json=in_json)
            region = {"x-amz-bucket-region": self.region} if self.region else {}
            return status, body if code else b"", {"Content-Type": kind, **region}
        body = b"" if method == "PUT" else OBJECT
        return 200, body, {"ETag": self.etag, "Last-Modified": formatdate(usegmt=True)}

    def _next(self) -> tuple[int, str] | None:
        if self._times <= 0:
            return None
        self._times -= 1
        return self._refusal

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _told(method: str, code: str, *, in_json: bool) -> tuple[bytes, str]:
    """A refusal's body and its content type."""
    if in_json:
        return json.dumps({"__type": code, "message": f"told: {code}"}).encode(), "application/json"
    error = f"<Error><Code>{code}</Code><Message>told: {code}</Message></Error>"
    if method == "POST":
        error = f"<ErrorResponse>{error}</ErrorResponse>"
    return error.encode(), "application/xml"


@contextmanager
def refusing_s3() -> Iterator[RefusingS3]:
    """The server while a test needs it."""
    server = RefusingS3()
    try:
        yield server
    finally:
        server.close()
