"""Fetches one image from S3 or over https, or says why not."""

import hashlib
import io
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, overload

from botocore.exceptions import BotoCoreError, ClientError
from urllib3.exceptions import HTTPError

from blipq.contract import ErrorCode, ImageRef
from blipq.errors import PermanentError, TransientError, WorkError
from blipq.s3.outputs import is_allowed
from blipq.s3.refusals import OF_THE_ASKER, Refusal, S3Refused, refusal_of, status_of
from blipq.s3.storage import Storage
from blipq_worker.images.coding import TooLong, plain
from blipq_worker.images.https import HttpsFetcher
from blipq_worker.images.objects import Answer, Objects
from blipq_worker.images.s3_access import AccessRefused

CHUNK_BYTES = 256 * 1024

_PERMANENT = {
    Refusal.MISSING: ErrorCode.IMAGE_NOT_FOUND,
    Refusal.CHANGED: ErrorCode.IMAGE_CHANGED,
    Refusal.FORBIDDEN: ErrorCode.IMAGE_FORBIDDEN,
    Refusal.ENCRYPTION: ErrorCode.IMAGE_FORBIDDEN,
    Refusal.INVALID: ErrorCode.INVALID_REQUEST,
}

#: Called with the bytes of an object.
Sized = Callable[[int], object]

#: Names that ``Storage.upload`` gives: the digest of the content, and an ending.
_DIGEST_KEY = re.compile(r"(?:.*/)?(?P<digest>[0-9a-f]{64})(\..*)?")


@dataclass(frozen=True, slots=True)
class Fetched:
    """An image's bytes, their SHA-256, and the ETag of that very answer (None: there was none)."""

    data: bytes
    digest: str
    etag: str | None


class Fetcher:
    """Reads objects, or parts of them, under a cap on bytes and on the time in all."""

    def __init__(
        self,
        storage: Storage,
        *,
        max_bytes: int,
        timeout_s: float,
        allowed_buckets: Sequence[str] = (),
        https: HttpsFetcher | None = None,
    ) -> None:
        self._inbox = storage.settings.inbox_bucket
        self._objects = Objects(storage)
        self.max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._allowed = tuple(allowed_buckets)
        self._https = https

    @overload
    def fetch(self, image: ImageRef, *, sized: Sized = ...) -> Fetched: ...

    @overload
    def fetch(
        self, image: ImageRef, *, unless: str | None, sized: Sized = ...
    ) -> Fetched | None: ...

    def fetch(
        self,
        image: ImageRef,
        *,
        unless: str | None = None,
        sized: Sized = lambda length: None,
    ) -> Fetched | None:
        """The image, or None where an object still has the ETag ``unless``.

        Its store says so, who thereby also says that the object exists and may be read. sized: is
        given the length of an object, where its store gives it, before the bytes come. Raises
        PermanentError (image_not_found, image_forbidden, image_changed, image_too_large,
        url_forbidden, invalid_request), TransientError (image_unavailable), or AccessRefused. Bytes
        are counted while they stream, and the deadline covers the whole download: a slow drip never
        trips a read timeout.
        """
        if not image.in_s3:
            return _fetched(self._over_https(image), None)
        self._check_allowed(image)
        if image.length is not None and image.length > self.max_bytes:
            raise self._too_large(image)
        deadline = time.monotonic() + self._timeout_s
        try:
            answer = self._objects.get(_arguments(image, unless))
            if answer is None:
                return None
            _check_etag(image, answer)
            _check_part(image, answer)
            fetched = _fetched(self._read(image, answer, deadline, sized), answer.etag)
        except (ClientError, BotoCoreError, S3Refused) as error:
            if unless is not None and _is_unmodified(error):
                return None
            raise _refused(image, error) from error
        except (HTTPError, OSError) as error:
            message = f"{image.uri}: {error}"
            raise TransientError(ErrorCode.IMAGE_UNAVAILABLE, message) from error
        self._check_digest(image, fetched)
        return fetched

    def _check_digest(self, image: ImageRef, fetched: Fetched) -> None:
        """An upload is what its name says, whoever may write to the inbox.

        The name says nothing of a part, whose reference pins the object by other means.
        """
        if image.is_part:
            return
        named = _DIGEST_KEY.fullmatch(image.key)
        if image.bucket != self._inbox or named is None:
            return
        if named["digest"] != fetched.digest:
            message = f"{image.uri} holds other bytes than were uploaded: upload the image again"
            raise PermanentError(ErrorCode.IMAGE_CHANGED, message)

    def _over_https(self, image: ImageRef) -> bytes:
        if self._https is None:
            message = "this worker reads s3:// alone (BLIPQ_HTTPS_IMAGES)"
            raise PermanentError(ErrorCode.URL_FORBIDDEN, message)
        return self._https.fetch(image)

    def _check_allowed(self, image: ImageRef) -> None:
        if not is_allowed(image.bucket, image.key, self._allowed):
            message = f"{image.uri} is outside BLIPQ_ALLOWED_BUCKETS"
            raise PermanentError(ErrorCode.IMAGE_FORBIDDEN, message)

    def _read(self, image: ImageRef, answer: Answer, deadline: float, sized: Sized) -> bytes:
        length = answer.length
        try:
            if length is not None and length > self.max_bytes:
                raise self._too_large(image)
            if length is not None and not answer.coding:  # it may be packed
                sized(length)
            data = io.BytesIO()  # its value is its buffer: the bytes are held once
            # read1-sized steps: a whole chunk of a drip would outlast the deadline unseen.
            while piece := answer.raw.read1(CHUNK_BYTES):
                data.write(piece)
                if data.tell() > self.max_bytes:
                    raise self._too_large(image)
                if time.monotonic() > deadline:
                    message = f"{image.uri}: not read within {self._timeout_s:g} s"
                    raise TransientError(ErrorCode.IMAGE_UNAVAILABLE, message)
            if length is not None and data.tell() != length:
                message = f"{image.uri}: the connection was cut after {data.tell():,} bytes"
                raise TransientError(ErrorCode.IMAGE_UNAVAILABLE, message)
        except BaseException:
            answer.raw.close()  # unread bytes: the connection cannot be used again
            raise
        if image.is_part:  # offsets count stored bytes
            return data.getvalue()
        try:
            return plain(data.getvalue(), answer.coding, self.max_bytes)
        except TooLong:
            raise self._too_large(image) from None

    def _too_large(self, image: ImageRef) -> PermanentError:
        message = f"{image.uri} is larger than {self.max_bytes:,} bytes"
        return PermanentError(ErrorCode.IMAGE_TOO_LARGE, message)


def _fetched(data: bytes, etag: str | None) -> Fetched:
    return Fetched(data, hashlib.sha256(data).hexdigest(), etag)


def _arguments(image: ImageRef, unless: str | None) -> dict[str, Any]:
    arguments: dict[str, Any] = {"Bucket": image.bucket, "Key": image.key}
    if image.version_id is not None:
        arguments["VersionId"] = image.version_id
    if image.offset is not None and image.length is not None:
        arguments["Range"] = f"bytes={image.offset}-{image.offset + image.length - 1}"
    if unless is not None and (image.etag is None or _same(image.etag, unless)):
        arguments["IfNoneMatch"] = unless
    elif image.etag is not None:
        arguments["IfMatch"] = image.etag
    return arguments


def _check_etag(image: ImageRef, answer: Answer) -> None:
    """Refuses other bytes than those requested, whatever the server makes of conditions."""
    etag = answer.etag
    if image.etag is not None and etag is not None and not _same(image.etag, etag):
        answer.raw.close()
        message = f"{image.uri} has the ETag {etag} now"
        raise PermanentError(ErrorCode.IMAGE_CHANGED, message)


def _check_part(image: ImageRef, answer: Answer) -> None:
    """Refuses another part than the requested one: an object that ends earlier, or a whole one."""
    if image.offset is None or image.length is None:
        return
    wanted = f"bytes {image.offset}-{image.offset + image.length - 1}/"
    found = answer.part
    if found is None or not found.startswith(wanted):
        answer.raw.close()
        shown = found or "the whole object"
        message = f"{image.uri}: S3 gives {shown} for {wanted.rstrip('/')}"
        raise PermanentError(ErrorCode.INVALID_REQUEST, message)


def _same(one: str, other: str) -> bool:
    """Whether two ETags are equal; callers write them with and without quotes."""
    return one.strip('"') == other.strip('"')


def _is_unmodified(error: Exception) -> bool:
    return isinstance(error, ClientError) and status_of(error) == HTTPStatus.NOT_MODIFIED


def _refused(image: ImageRef, error: ClientError | BotoCoreError | S3Refused) -> WorkError:
    refusal = refusal_of(error)
    reported = error.response.get("Error", {}) if isinstance(error, ClientError) else {}
    message = f"{image.uri}: {reported.get('Message') or error}"
    if refusal in OF_THE_ASKER:
        # An account that is closed: where it is not ours, its bucket is as good as closed.
        closed = refusal is Refusal.ACCOUNT
        return AccessRefused(message, ErrorCode.IMAGE_FORBIDDEN if closed else None)
    if refusal in _PERMANENT:
        return PermanentError(_PERMANENT[refusal], message)
    return TransientError(ErrorCode.IMAGE_UNAVAILABLE, message)
