"""Uploads that somebody without credentials makes: one object, of one length and digest."""

import base64
from dataclasses import dataclass
from typing import Any

from blipq.s3.boto import boto_client
from blipq.s3.refusals import s3_errors
from blipq.settings import Settings


@dataclass(frozen=True, slots=True)
class PresignedPut:
    """A URL to PUT to, with the headers that it was signed with."""

    url: str
    headers: dict[str, str]


class Presigner:
    """Signs uploads to the inbox, at the endpoint that uploaders reach."""

    def __init__(self, settings: Settings, endpoint_url: str | None) -> None:
        self._settings = settings
        self._endpoint_url = endpoint_url or settings.s3_endpoint_url
        self._client: Any = None

    def put(
        self, key: str, *, digest: str, size: int, content_type: str, expires_in: int
    ) -> PresignedPut:
        """Signs one upload. ``digest``: the SHA-256 in hex. Raises QueueUnavailable, S3Refused.

        Length and digest are among the signed headers: S3 takes no other bytes.
        """
        headers = {
            "Content-Length": str(size),
            "Content-Type": content_type,
            "x-amz-checksum-sha256": base64.b64encode(bytes.fromhex(digest)).decode(),
        }
        what = {
            "Bucket": self._settings.inbox_bucket,
            "Key": key,
            "ContentLength": size,
            "ContentType": content_type,
            "ChecksumSHA256": headers["x-amz-checksum-sha256"],
        }
        with s3_errors(f"s3://{self._settings.inbox_bucket}"):
            self._client = self._client or self._connected()
            url: str = self._client.generate_presigned_url(
                "put_object", Params=what, ExpiresIn=expires_in
            )
        return PresignedPut(url, headers)

    def _connected(self) -> Any:
        """A client that signs with version 4: version 2 signs no length."""
        from botocore.config import Config

        secret = self._settings.s3_secret_access_key
        region = self._settings.s3_region or ("us-east-1" if self._endpoint_url else None)
        style: Any = {"addressing_style": "path"} if self._endpoint_url else {}
        return boto_client(
            "s3",
            endpoint_url=self._endpoint_url,
            aws_access_key_id=self._settings.s3_access_key_id,
            aws_secret_access_key=secret.get_secret_value() if secret else None,
            region_name=region,
            config=Config(signature_version="s3v4", s3=style),
        )
