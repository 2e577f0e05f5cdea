"""S3 as both sides use it: one client per process, uploads named after their content."""

import hashlib
import mimetypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blipq.contract import ImageRef, split_s3_uri
from blipq.errors import InvalidRequest, QueueUnavailable
from blipq.settings import Settings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

#: A client refuses larger files before uploading them; the worker's own cap decides.
MAX_UPLOAD_BYTES = 64 * 2**20


class Storage:
    """Reads and writes objects. boto3 is imported at the first use."""

    def __init__(
        self,
        settings: Settings,
        *,
        max_connections: int = 16,
        read_timeout_s: float = 5.0,
        attempts: int = 2,
    ) -> None:
        self.settings = settings
        self._max_connections = max_connections
        self._read_timeout_s = read_timeout_s
        self._attempts = attempts

    @cached_property
    def client(self) -> "S3Client":
        """The boto3 client; it is thread-safe."""
        import boto3
        from botocore.config import Config

        secret = self.settings.s3_secret_access_key
        session = boto3.session.Session()
        return session.client(
            "s3",
            endpoint_url=self.settings.s3_endpoint_url,
            aws_access_key_id=self.settings.s3_access_key_id,
            aws_secret_access_key=secret.get_secret_value() if secret else None,
            region_name=self.settings.s3_region
            or ("us-east-1" if self.settings.s3_endpoint_url else None),
            config=Config(
                connect_timeout=3,
                read_timeout=self._read_timeout_s,
                retries={"mode": "standard", "total_max_attempts": self._attempts},
                max_pool_connections=self._max_connections,
                s3={"addressing_style": "path"} if self.settings.s3_endpoint_url else {},
            ),
        )

    def upload(self, source: str | Path | bytes) -> ImageRef:
        """Puts a file or bytes into the inbox bucket under its SHA-256, once.

        Raises InvalidRequest for a file that cannot be read and QueueUnavailable when S3 does not
        take it.
        """
        data, suffix = _read(source)
        bucket = self.settings.inbox_bucket
        key = f"{hashlib.sha256(data).hexdigest()}{suffix}"
        content_type = mimetypes.types_map.get(suffix, "application/octet-stream")
        with s3_errors():
            self._put_once(bucket, key, data, content_type)
        return ImageRef(uri=f"s3://{bucket}/{key}")

    def _put_once(self, bucket: str, key: str, data: bytes, content_type: str) -> None:
        from botocore.exceptions import ClientError

        try:
            self.client.put_object(
                Bucket=bucket, Key=key, Body=data, ContentType=content_type, IfNoneMatch="*"
            )
        except ClientError as error:
            if status_of(error) not in (409, 412):  # it is there already
                raise

    def put(self, uri: str, data: bytes, *, content_type: str) -> None:
        """Writes an object."""
        bucket, key = split_s3_uri(uri)
        with s3_errors():
            self.client.put_object(Bucket=bucket, Key=key, Body=data, ContentType=content_type)

    def presign(self, uri: str, *, expires_in: int = 3600) -> str:
        """An https URL that reads the object for ``expires_in`` seconds."""
        bucket, key = split_s3_uri(uri)
        return self.client.generate_presigned_url(
            "get_object", Params={"Bucket": bucket, "Key": key}, ExpiresIn=expires_in
        )

    def create_bucket(self, bucket: str) -> None:
        """Makes a bucket unless it exists."""
        exists = self.client.exceptions
        with suppress(exists.BucketAlreadyOwnedByYou, exists.BucketAlreadyExists):
            self.client.create_bucket(Bucket=bucket)

    def has_bucket(self, bucket: str) -> bool:
        """Whether a bucket exists."""
        from botocore.exceptions import ClientError

        with s3_errors():
            try:
                self.client.head_bucket(Bucket=bucket)
            except ClientError as error:
                if status_of(error) != 404:
                    raise
                return False
        return True


def status_of(error: Any) -> int:
    """The HTTP status of a botocore ClientError, or 0."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


@contextmanager
def s3_errors() -> Iterator[None]:
    """Botocore's exceptions as blipq's, for the producer's side."""
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

    try:
        yield
    except NoCredentialsError as error:
        raise InvalidRequest(
            "no S3 credentials: start a local stack with blipq up, or set BLIPQ_S3_ACCESS_KEY_ID "
            "and BLIPQ_S3_SECRET_ACCESS_KEY or AWS's own variables (one BLIPQ_* service variable "
            "switches the local stack off)"
        ) from error
    except ClientError as error:
        if 400 <= status_of(error) < 500:
            raise InvalidRequest(f"S3 refuses: {error}") from error
        raise QueueUnavailable(f"S3 does not take the object: {error}") from error
    except BotoCoreError as error:
        raise QueueUnavailable(f"S3 does not answer: {error}") from error


def _read(source: str | Path | bytes) -> tuple[bytes, str]:
    if isinstance(source, bytes):
        data, suffix = source, ""
    else:
        path = Path(source)
        try:
            size = path.stat().st_size
            data = path.read_bytes() if size <= MAX_UPLOAD_BYTES else b""
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            why = getattr(error, "strerror", None) or error
            raise InvalidRequest(f"cannot read {path}: {why}") from error
        if size > MAX_UPLOAD_BYTES:
            raise InvalidRequest(f"{path} has {size:,} bytes; the most is {MAX_UPLOAD_BYTES:,}")
        suffix = path.suffix.lower()
    if not data:
        raise InvalidRequest("the image is empty")
    return data, suffix
