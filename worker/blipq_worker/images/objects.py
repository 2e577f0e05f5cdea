"""GETs of S3 objects, without what botocore works out anew for each of them.

botocore spends several times the CPU time of signing and sending on parameters, endpoint rules,
events and parsing. What it found for one object of a bucket holds for the others: they are signed
by its signer and sent by its HTTP session. Any answer but an object or "not modified" is left to
botocore, which sends its own request: errors, redirects and retries are its own.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

from botocore.awsrequest import AWSRequest
from botocore.exceptions import ConnectionError, HTTPClientError, ReadTimeoutError

from blipq.s3.storage import Storage

#: Buckets of which something is remembered: about a kilobyte each.
MOST_BUCKETS = 1_000

_SIGNATURE = "AWS4-HMAC-SHA256 "
#: Arguments of GetObject, and the headers that they are sent as.
_CONDITIONS = {"Range": "Range", "IfMatch": "If-Match", "IfNoneMatch": "If-None-Match"}
#: Refusals that say nothing of the bucket's other objects.
_OF_ONE_OBJECT = (
    HTTPStatus.FORBIDDEN,
    HTTPStatus.NOT_FOUND,
    HTTPStatus.PRECONDITION_FAILED,
    HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
)
#: Headers that the next request has anew, or has no use for: nobody reads checksums.
_OF_ONE_REQUEST = frozenset(
    {
        *(each.lower() for each in _CONDITIONS.values()),
        "amz-sdk-invocation-id",
        "amz-sdk-request",
        "authorization",
        "x-amz-checksum-mode",
        "x-amz-content-sha256",
        "x-amz-date",
        "x-amz-s3session-token",
        "x-amz-security-token",
        "x-amzn-trace-id",
    }
)


@dataclass(frozen=True, slots=True)
class Answer:
    """An object, or a part of one. raw: urllib3's response, of whose body nothing is read."""

    raw: Any
    length: int | None
    etag: str | None
    coding: str | None
    part: str | None


@dataclass(frozen=True, slots=True)
class _Known:
    """How botocore requests the objects of a bucket. url: up to the key."""

    url: str
    headers: Mapping[str, str]
    context: Mapping[str, Any]


class _Call(threading.local):
    """A thread's latest call. request: as botocore signed it. spent: attempts made before it."""

    request: Any = None
    spent = 0


class _Unusual(Exception):
    """An answer that is for botocore to read."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class Objects:
    """Asks S3 for objects. Thread-safe."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._known: dict[str, _Known] = {}
        self._call = _Call()
        # Both are the client's, and the same for all of its requests.
        self._signer: Any = None
        self._session: Any = None

    def get(self, arguments: Mapping[str, Any]) -> Answer | None:
        """The answer to GetObject; None where ``IfNoneMatch`` is the ETag that the object has.

        Raises as the client's ``get_object``, and as ``boto_client``. A server that lets us wait
        gets as many requests as from botocore alone.
        """
        client = self._client
        if (known := self._known.get(arguments["Bucket"])) is not None:
            request = self._signed(known, arguments)  # credentials are fetched once
            try:
                return _read(self._session.send(request), arguments)
            except (ConnectionError, ReadTimeoutError):
                if self._attempts <= 1:
                    raise
                self._call.spent = 1
            except HTTPClientError:  # such as a connection that the server has closed meanwhile
                pass
            except _Unusual as answer:
                if answer.status not in _OF_ONE_OBJECT:
                    self._known.pop(arguments["Bucket"], None)
        try:
            found = client.get_object(**arguments)
        finally:
            self._call.spent = 0  # this thread's next call has all of its attempts
        self._learn(arguments)
        return Answer(
            found["Body"]._raw_stream,  # it can be read as its bytes come
            found.get("ContentLength"),  # none in a chunked answer
            found.get("ETag"),
            found.get("ContentEncoding"),
            found.get("ContentRange"),
        )

    @cached_property
    def _client(self) -> Any:
        client: Any = self._storage.client
        client.meta.events.register("before-sign.s3.GetObject", self._signs)
        client.meta.events.register("needs-retry.s3.GetObject", self._answered)
        return client

    def _signs(self, request: Any, request_signer: Any, **_: Any) -> None:
        self._call.request, self._signer = request, request_signer

    def _answered(
        self, endpoint: Any, attempts: int, caught_exception: Any, **_: Any
    ) -> bool | None:
        """Ends botocore's attempts one earlier where a server has been waited for before them."""
        self._session = endpoint.http_session
        if caught_exception is None or not self._call.spent:
            return None
        return False if attempts + self._call.spent >= self._attempts else None

    @property
    def _attempts(self) -> int:
        most: int = self._client.meta.config.retries["total_max_attempts"]
        return most

    def _learn(self, arguments: Mapping[str, Any]) -> None:
        """Remembers how this thread's request was made, which has just been answered."""
        request, key = self._call.request, _quoted(arguments["Key"])
        url = request.url.partition("?")[0]
        signature = request.headers.get("Authorization", "")
        # In a request to an ARN more than its URL is signed.
        if not signature.startswith(_SIGNATURE) or ":" in arguments["Bucket"]:
            return
        if not url.endswith(f"/{key}"):
            return
        headers = {
            name: each
            for name, each in request.headers.items()
            if name.lower() not in _OF_ONE_REQUEST
        }
        if len(self._known) >= MOST_BUCKETS:
            self._known.clear()
        url = url.removesuffix(key)
        self._known[arguments["Bucket"]] = _Known(url, headers, dict(request.context))

    def _signed(self, known: _Known, arguments: Mapping[str, Any]) -> Any:
        """The request as it is sent. Raises what credentials that are not to be had raise."""
        url = known.url + _quoted(arguments["Key"])
        if "VersionId" in arguments:
            url += f"?versionId={quote(arguments['VersionId'], safe='-._~')}"
        request = AWSRequest("GET", url, known.headers, stream_output=True)
        for argument, header in _CONDITIONS.items():
            if argument in arguments:
                request.headers[header] = arguments[argument]
        request.context = dict(known.context)
        self._signer.sign("GetObject", request)
        return request.prepare()


def _read(answer: Any, arguments: Mapping[str, Any]) -> Answer | None:
    """What S3 answers. Raises _Unusual."""
    if answer.status_code == HTTPStatus.NOT_MODIFIED and "IfNoneMatch" in arguments:
        answer.raw.drain_conn()
        return None
    headers, length = answer.headers, answer.headers.get("Content-Length")
    readable = length is None or length.isdecimal()
    if not readable or answer.status_code not in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
        answer.raw.close()
        raise _Unusual(answer.status_code)
    return Answer(
        answer.raw,
        None if length is None else int(length),
        headers.get("ETag"),
        headers.get("Content-Encoding"),
        headers.get("Content-Range"),
    )


def _quoted(key: str) -> str:
    """A key as botocore writes it in a URL."""
    return quote(key, safe="/~")
