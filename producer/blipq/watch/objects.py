"""Objects as S3 has them now, whatever a notification holds."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from blipq.contract import ImageRef
from blipq.s3.refusals import s3_errors
from blipq.s3.storage import Storage, told_at
from blipq.submission import checked

PAGE_KEYS = 1000


@dataclass(frozen=True, slots=True)
class Upload:
    """One version of an object. ``modified`` is in whole seconds, as HTTP has it.

    ``content_type`` and ``version_id`` are None where no HEAD request was made.
    """

    bucket: str
    key: str
    etag: str
    size: int
    modified: datetime
    version_id: str | None = None
    content_type: str | None = None

    @property
    def uri(self) -> str:
        """``s3://bucket/key``."""
        return f"s3://{self.bucket}/{self.key}"

    @property
    def identity(self) -> str:
        """The same for every event, listing and backfill that finds this version.

        Listings have no version ids, so it is made of what they and HEAD both have. The time is in
        it because the same bytes may be put there, replaced, and put there again.
        """
        parts = [self.bucket, self.key, self.etag, int(self.modified.timestamp())]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

    @property
    def reference(self) -> ImageRef:
        """What the job is about: these bytes and no others. Raises InvalidRequest."""
        return checked(ImageRef, uri=self.uri, version_id=self.version_id, etag=self.etag)


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a listing, in the order of keys. ``asked_at`` is on S3's clock."""

    uploads: list[Upload]
    asked_at: datetime


class Objects:
    """Reads attributes of objects. Raises S3Unavailable when S3 is away, S3Refused."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def head(self, bucket: str, key: str, version_id: str | None = None) -> Upload | None:
        """The object, or None if it is there no more."""
        found = self._storage.head(bucket, key, version_id)
        if found is None:
            return None
        return Upload(
            bucket=bucket,
            key=key,
            etag=found["ETag"].strip('"'),
            size=found["ContentLength"],
            modified=_whole_second(found["LastModified"]),
            version_id=found.get("VersionId"),
            content_type=found.get("ContentType"),
        )

    def pages(self, bucket: str, prefix: str, after: str = "") -> Iterator[Page]:
        """What is there, from behind the key ``after`` on."""
        more = True
        while more:
            with s3_errors(f"s3://{bucket}/{prefix}"):
                answer = self._storage.client.list_objects_v2(
                    Bucket=bucket, Prefix=prefix, StartAfter=after, MaxKeys=PAGE_KEYS
                )
            uploads = [_listed(bucket, found) for found in answer.get("Contents", ())]
            yield Page(uploads, told_at(answer))
            more = bool(uploads) and answer["IsTruncated"]
            after = uploads[-1].key if uploads else after


def _listed(bucket: str, found: Any) -> Upload:
    modified = _whole_second(found["LastModified"])
    return Upload(bucket, found["Key"], found["ETag"].strip('"'), found["Size"], modified)


def _whole_second(at: datetime) -> datetime:
    return at.astimezone(UTC).replace(microsecond=0)
