"""Fetches one image from a URL that a stranger chose, or raises an error with the reason."""

import asyncio
import io
import re
from urllib.parse import quote, urljoin

import httpcore2

from blipq import __version__
from blipq.contract import ErrorCode, ImageRef
from blipq.errors import PermanentError, TransientError
from blipq.ssrf.http import FAILURES, GuardedHttp, header
from blipq.ssrf.policy import Forbidden
from blipq_worker.images.coding import TooLong, plain

MAX_REDIRECTS = 3
REDIRECTS = frozenset({301, 302, 303, 307, 308})
#: Answers with the whole image; 203 is what a proxy has changed, such as by scaling it down.
WHOLE = frozenset({200, 203})
#: Answers that a repetition may change, beside 5xx.
PASSING = frozenset({408, 425, 429})
#: An error repeats so many characters of a server's answer.
LONGEST_SHOWN = 200
HEADERS = {
    "Accept": "image/*",
    "Accept-Encoding": "identity",
    "User-Agent": f"blipq/{__version__}",
}
_PRINTABLE = "".join(map(chr, range(0x21, 0x7F)))
_CODES = {
    401: ErrorCode.IMAGE_FORBIDDEN,
    403: ErrorCode.IMAGE_FORBIDDEN,
    404: ErrorCode.IMAGE_NOT_FOUND,
    410: ErrorCode.IMAGE_NOT_FOUND,
}


class HttpsFetcher:
    """Reads images whole, under a cap on bytes; ``http`` bounds the time of each request."""

    def __init__(self, http: GuardedHttp, *, max_bytes: int) -> None:
        self._http = http
        self._max_bytes = max_bytes

    def fetch(self, image: ImageRef) -> bytes:
        """The image's bytes.

        Raises PermanentError (url_forbidden, image_not_found, image_forbidden, image_changed,
        image_too_large) or TransientError (image_unavailable). A few redirects are followed, each
        through the guard; one deadline covers them all.
        """
        place = _shown(image.uri)
        try:
            return asyncio.run(self._within_deadline(image))
        except Forbidden as error:
            raise PermanentError(ErrorCode.URL_FORBIDDEN, f"{place}: {error}") from error
        except (TimeoutError, httpcore2.TimeoutException) as error:
            message = f"{place}: not read within {self._http.timeout_s:g} s"
            raise TransientError(ErrorCode.IMAGE_UNAVAILABLE, message) from error
        except FAILURES as error:
            message = f"{place}: {type(error).__name__}: {str(error)[:LONGEST_SHOWN]}"
            raise TransientError(ErrorCode.IMAGE_UNAVAILABLE, message) from error

    async def _within_deadline(self, image: ImageRef) -> bytes:
        async with asyncio.timeout(self._http.timeout_s):
            url = image.uri
            for _ in range(MAX_REDIRECTS + 1):
                async with self._http.response("GET", url, HEADERS) as response:
                    target = _redirect(response)
                    if target is None:
                        return await self._read(image, response)
                    url = _joined(url, target)
        raise Forbidden(f"more than {MAX_REDIRECTS} redirects")

    async def _read(self, image: ImageRef, response: httpcore2.Response) -> bytes:
        _check_status(image, response.status)
        _check_etag(image, header(response, b"etag"))
        length = header(response, b"content-length")
        if length is not None and int(length) > self._max_bytes:
            raise self._too_large(image)
        data = io.BytesIO()  # its value is its buffer: the bytes are held once
        async for piece in response.aiter_stream():
            data.write(piece)
            if data.tell() > self._max_bytes:
                raise self._too_large(image)
        return self._plain(image, response, data.getvalue())

    def _plain(self, image: ImageRef, response: httpcore2.Response, data: bytes) -> bytes:
        coding = header(response, b"content-encoding")
        try:
            return plain(data, coding, self._max_bytes)
        except TooLong:
            raise self._too_large(image) from None

    def _too_large(self, image: ImageRef) -> PermanentError:
        message = f"{_shown(image.uri)} is larger than {self._max_bytes:,} bytes"
        return PermanentError(ErrorCode.IMAGE_TOO_LARGE, message)


def _shown(url: str) -> str:
    """A URL for logs and messages: what follows ``?`` may be a signature."""
    return url.partition("?")[0]


def _redirect(response: httpcore2.Response) -> str | None:
    """Where a redirect leads. Servers write raw spaces, UTF-8 and fragments there: see RFC 9110."""
    target = header(response, b"location") if response.status in REDIRECTS else None
    if target is None:
        return None
    return quote(target.partition("#")[0], safe=_PRINTABLE, encoding="latin-1")


def _joined(url: str, target: str) -> str:
    """The absolute URL of a redirect's target. Raises Forbidden."""
    try:
        return urljoin(url, target)
    except ValueError as error:  # brackets around what is no address
        raise Forbidden(f"it redirects to what is no URL: {error}") from None


def _check_status(image: ImageRef, status: int) -> None:
    if status in WHOLE:
        return
    message = f"{_shown(image.uri)}: HTTP {status}"
    if status >= 500 or status in PASSING:
        raise TransientError(ErrorCode.IMAGE_UNAVAILABLE, message)
    raise PermanentError(_CODES.get(status, ErrorCode.IMAGE_FORBIDDEN), message)


def _check_etag(image: ImageRef, found: str | None) -> None:
    if image.etag is not None and (found is None or _opaque(found) != _opaque(image.etag)):
        shown = found[:LONGEST_SHOWN] if found else "missing"
        message = f"{_shown(image.uri)}: its ETag is {shown}, not {image.etag}"
        raise PermanentError(ErrorCode.IMAGE_CHANGED, message)


def _opaque(etag: str) -> str:
    """An ETag without its quotes and its mark of weakness."""
    return re.sub(r'^(W/)?"|"$', "", etag)
