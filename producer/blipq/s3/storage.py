"""S3 as both sides use it: one client per process, uploads named after their content."""

import hashlib
import mimetypes
import re
import shlex
from collections.abc import Callable
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blipq.contract import ImageRef, split_s3_uri
from blipq.errors import InvalidRequest
from blipq.program import blipq
from blipq.s3.boto import boto_client
from blipq.s3.refusals import (
    OF_THE_ASKER,
    Refusal,
    S3Refused,
    S3Unavailable,
    code_of,
    refusal_of,
    s3_errors,
    status_of,
)
from blipq.settings import Settings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

#: A client refuses larger files before uploading them; the worker's own cap decides.
MAX_UPLOAD_BYTES = 64 * 2**20
#: Of what is taken for a path an error repeats so many characters: it may be a whole data: URL.
LONGEST_SHOWN = 200

#: Nothing is there: what matters is whether S3 accepts the request.
ACCESS_KEY = "blipq-access"
#: What HEAD answers where GET would say why.
_WORDLESS = (400, 403)
_MD5 = re.compile(r"[0-9a-f]{32}")
_CHANGED_MEANWHILE = ("NoSuchKey", "ConditionalRequestConflict")


class Storage:
    """Reads and writes objects. boto3 is imported at the first use."""

    def __init__(
        self,
        settings: Settings,
        *,
        max_connections: int = 16,
        connect_timeout_s: float = 3.0,
        read_timeout_s: float = 5.0,
        attempts: int = 2,
    ) -> None:
        self.settings = settings
        self._max_connections = max_connections
        self._connect_timeout_s = connect_timeout_s
        self._read_timeout_s = read_timeout_s
        self._attempts = attempts

    @cached_property
    def client(self) -> "S3Client":
        """The boto3 client; it is thread-safe. Raises as ``boto_client``."""
        from botocore.config import Config

        secret = self.settings.s3_secret_access_key
        client: S3Client = boto_client(
            "s3",
            endpoint_url=self.settings.s3_endpoint_url,
            aws_access_key_id=self.settings.s3_access_key_id,
            aws_secret_access_key=secret.get_secret_value() if secret else None,
            region_name=self.settings.s3_region
            or ("us-east-1" if self.settings.s3_endpoint_url else None),
            config=Config(
                connect_timeout=self._connect_timeout_s,
                read_timeout=self._read_timeout_s,
                retries={"mode": "standard", "total_max_attempts": self._attempts},
                max_pool_connections=self._max_connections,
                s3={"addressing_style": "path"} if self.settings.s3_endpoint_url else {},
            ),
        )
        return client

    def check_configuration(self) -> None:
        """Raises S3Refused where endpoint, profile or AWS's files are wrong. Asks nobody."""
        from botocore.exceptions import BotoCoreError, ClientError

        with suppress(BotoCoreError, ClientError):  # credentials may come later
            _ = self.client

    def upload(self, source: str | Path | bytes, *, folder: str = "") -> ImageRef:
        """Puts a file or bytes into the inbox bucket under its SHA-256, once.

        ``folder``: the part of the inbox that it goes to, with a slash at its end.

        What is there is written anew where it is older than half of ``BLIPQ_INBOX_TTL``, so that
        the bucket's lifecycle rule cannot delete it while its job waits, and where its bytes are
        others.

        Raises InvalidRequest for a file that cannot be read and QueueUnavailable when S3 does not
        take it.
        """
        data, suffix = to_upload(source)
        bucket = self.settings.inbox_bucket
        key = f"{folder}{hashlib.sha256(data).hexdigest()}{suffix}"
        content_type = mimetypes.types_map.get(suffix, "application/octet-stream")
        with s3_errors(f"s3://{bucket}"):
            self._put_once(bucket, key, data, content_type)
        return ImageRef(uri=f"s3://{bucket}/{key}")

    def _put_once(self, bucket: str, key: str, data: bytes, content_type: str) -> None:
        """Writes an object unless it is there and young."""
        from botocore.exceptions import ClientError

        what: Any = {"Bucket": bucket, "Key": key, "Body": data, "ContentType": content_type}
        try:
            self.client.put_object(**what, IfNoneMatch="*")
        except ClientError as error:
            if refusal_of(error) is not Refusal.CHANGED:
                raise
            if self._is_due(bucket, key, data):
                self.client.put_object(**what)

    def _is_due(self, bucket: str, key: str, data: bytes) -> bool:
        """Whether an object is to be written anew: too old, with other bytes, or not to be seen."""
        from botocore.exceptions import ClientError

        try:
            found = self.client.head_object(Bucket=bucket, Key=key)
        except ClientError as error:
            if status_of(error) in (*_WORDLESS, 404):  # a producer may lack s3:GetObject
                return True
            raise
        age = told_at(found) - found["LastModified"]
        return age > timedelta(seconds=self.settings.inbox_ttl / 2) or _differs(found, data)

    def put(self, uri: str, data: bytes, *, content_type: str) -> None:
        bucket, key = split_s3_uri(uri)
        with s3_errors(uri):
            self.client.put_object(Bucket=bucket, Key=key, Body=data, ContentType=content_type)

    def put_over(self, uri: str, data: bytes, there: str | None, *, content_type: str) -> bool:
        """Writes an object over what was there, or not at all: whether it did.

        there: the ETag of what is replaced, "" for nothing, None for whatever it is. A store that
        does not know such conditions writes in any case.
        """
        bucket, key = split_s3_uri(uri)
        what: Any = {"Bucket": bucket, "Key": key, "Body": data, "ContentType": content_type}
        with s3_errors(uri):
            if there is None:
                self.client.put_object(**what)
                return True
            condition = {"IfMatch": there} if there else {"IfNoneMatch": "*"}
            return self._put_if(what, condition)

    def _put_if(self, what: Any, condition: Any) -> bool:
        from botocore.exceptions import ClientError

        try:
            self.client.put_object(**what, **condition)
        except ClientError as error:
            if status_of(error) == 501:
                self.client.put_object(**what)
                return True
            # 404: what was to be replaced has been deleted.
            if refusal_of(error) is Refusal.CHANGED or code_of(error) in _CHANGED_MEANWHILE:
                return False
            raise
        return True

    def read(self, uri: str) -> bytes:
        """An object's bytes. Raises S3Refused, also for one that is too large to be of ours."""
        bucket, key = split_s3_uri(uri)
        with s3_errors(uri):
            answer = self.client.get_object(Bucket=bucket, Key=key)
            with closing(answer["Body"]) as body:
                data: bytes = body.read(MAX_UPLOAD_BYTES + 1)
        if len(data) > MAX_UPLOAD_BYTES:
            raise S3Refused(f"{uri} is too large: over {MAX_UPLOAD_BYTES:,} bytes", Refusal.INVALID)
        return data

    def delete(self, uri: str) -> None:
        """Deletes an object, if it is there. Of a bucket with versions, the others stay."""
        bucket, key = split_s3_uri(uri)
        with s3_errors(uri):
            self.client.delete_object(Bucket=bucket, Key=key)

    @property
    def longest_write_s(self) -> float:
        """How long one attempt at writing an object may take: connecting, sending, the response."""
        return self._attempts * (self._connect_timeout_s + 2 * self._read_timeout_s)

    def presign(self, uri: str, *, expires_in: int = 3600) -> str:
        """An https URL that reads the object for ``expires_in`` seconds."""
        bucket, key = split_s3_uri(uri)
        with s3_errors(uri):
            return self.client.generate_presigned_url(
                "get_object", Params={"Bucket": bucket, "Key": key}, ExpiresIn=expires_in
            )

    def create_bucket(self, bucket: str) -> None:
        """Makes a bucket unless it exists."""
        exists = self.client.exceptions
        with suppress(exists.BucketAlreadyOwnedByYou, exists.BucketAlreadyExists):
            self.client.create_bucket(Bucket=bucket)

    def has_bucket(self, bucket: str) -> bool:
        with s3_errors(f"s3://{bucket}"):
            found = self._found(
                lambda: self.client.head_bucket(Bucket=bucket),
                lambda: self.client.list_objects_v2(Bucket=bucket, MaxKeys=1),
            )
        return found is not None

    def head(self, bucket: str, key: str, version_id: str | None = None) -> Any | None:
        """The reply to a HEAD of an object, or None if it is not there."""
        which: Any = {"Bucket": bucket, "Key": key}
        if version_id:
            which["VersionId"] = version_id

        def read() -> None:
            self.client.get_object(**which, Range="bytes=0-0")["Body"].close()

        with s3_errors(f"s3://{bucket}/{key}"):
            return self._found(lambda: self.client.head_object(**which), read)

    def _found(self, head: Callable[[], Any], why: Callable[[], object]) -> Any | None:
        """The answer to a HEAD, or None if nothing is there.

        The reply to a refused HEAD has no body with the reason, so a GET is sent for it. If that is
        accepted, the refusal has passed.
        """
        from botocore.exceptions import ClientError

        try:
            return head()
        except ClientError as error:
            if refusal_of(error) is Refusal.MISSING:
                return None
            if status_of(error) not in _WORDLESS:
                raise
            refused = error
        try:
            why()
        except ClientError as error:
            if refusal_of(error) is Refusal.MISSING:
                return None
            if status_of(error) != 416:  # there is no byte in it to read
                raise
        raise S3Unavailable(f"S3 refused once: {refused}") from refused

    def refused_access(self) -> str | None:
        """Why S3 does not take our credentials, or None where it does.

        Whatever it answers about an object that is not there, it has taken the signature. Raises
        QueueUnavailable where it does not answer.
        """
        try:
            with s3_errors():
                self.client.get_object(Bucket=self.settings.inbox_bucket, Key=ACCESS_KEY)
        except (S3Refused, S3Unavailable) as error:
            if error.refusal in OF_THE_ASKER:
                return str(error)
            if isinstance(error, S3Unavailable):
                raise
        return None


def _differs(found: Any, data: bytes) -> bool:
    """Whether an object has other bytes, as far as HEAD shows.

    The ETag is their MD5, except where an object was written in parts (the ETag has a dash, and is
    not compared) or KMS encrypts it (it is written once more than need be).
    """
    if found["ContentLength"] != len(data):
        return True
    etag = found["ETag"].strip('"').lower()
    digest = hashlib.md5(data, usedforsecurity=False).hexdigest()
    return _MD5.fullmatch(etag) is not None and etag != digest


def arguments_of(image: ImageRef) -> Any:
    """What reads an image in S3: its part, and nothing of an object that has changed."""
    which: dict[str, Any] = {"Bucket": image.bucket, "Key": image.key}
    if image.version_id is not None:
        which["VersionId"] = image.version_id
    if image.etag is not None:
        which["IfMatch"] = image.etag
    if image.offset is not None and image.length is not None:
        which["Range"] = f"bytes={image.offset}-{image.offset + image.length - 1}"
    return which


def told_at(answer: Any) -> datetime:
    """When S3 gave an answer, on its clock."""
    date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
    return parsedate_to_datetime(date) if date else datetime.now(UTC)


def to_upload(source: str | Path | bytes) -> tuple[bytes, str]:
    """What is uploaded of a file or of bytes, and the file's ending. Raises InvalidRequest."""
    if isinstance(source, bytes):
        data, name, suffix = source, "the image", ""
    else:
        path = Path(source)
        data, name, suffix = _start_of(path), str(path), path.suffix.lower()
    if not data:
        raise InvalidRequest(f"{name} is empty")
    if len(data) > MAX_UPLOAD_BYTES:
        raise InvalidRequest(f"{name} is too large: the most is {MAX_UPLOAD_BYTES:,} bytes")
    return data, suffix


def _start_of(path: Path) -> bytes:
    """A file's bytes, one more than may be uploaded at the most.

    The size from the file system is no bound: pipes and devices have none.
    """
    try:
        with path.open("rb") as file:
            return file.read(MAX_UPLOAD_BYTES + 1)
    except IsADirectoryError:
        shown = str(path)[:LONGEST_SHOWN]
        command = blipq(f"bulk submit {shlex.quote(shown)}")
        raise InvalidRequest(f"{shown} is a folder: {command} takes the images in it") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        why = getattr(error, "strerror", None) or error
        raise InvalidRequest(f"cannot read {str(path)[:LONGEST_SHOWN]}: {why}") from error
