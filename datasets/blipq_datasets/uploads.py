"""Pictures that lie nowhere else: in the inbox, under the bulk's prefix, while jobs are about them.

The prefix is the only place where a bulk deletes anything.
"""

import hashlib
import mimetypes
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from blipq.contract import split_s3_uri
from blipq.s3.refusals import S3Refused, s3_errors
from blipq.s3.storage import Storage
from blipq.watch.objects import Objects

#: Uploads at a time, and objects that one request deletes.
AT_A_TIME, DELETED_AT_ONCE = 8, 1000


class Uploads:
    """The pictures of one bulk, by the number of their line."""

    def __init__(self, storage: Storage, bulk: str) -> None:
        self.prefix = f"s3://{storage.settings.inbox_bucket}/bulk/{bulk}/"
        self._storage = storage
        self._held: dict[int, str] = {}
        #: Pictures that S3 refused to delete.
        self.left = 0

    @property
    def held(self) -> Collection[int]:
        """Lines whose pictures this process has uploaded and not deleted."""
        return self._held.keys()

    def place_of(self, line: int, data: bytes, suffix: str) -> str:
        """Where a line's picture goes. Workers check that it has the digest in its name."""
        return f"{self.prefix}{line}/{hashlib.sha256(data).hexdigest()}{suffix}"

    def put(self, pictures: Mapping[int, tuple[str, bytes]]) -> None:
        """Uploads pictures to their places, by line. Raises S3Unavailable, S3Refused."""
        self._held |= {line: place for line, (place, _) in pictures.items()}
        if not pictures:
            return
        with ThreadPoolExecutor(min(AT_A_TIME, len(pictures))) as pool:
            for done in [pool.submit(self._put, *each) for each in pictures.values()]:
                done.result()

    def _put(self, place: str, data: bytes) -> None:
        kind = mimetypes.guess_type(place)[0] or "application/octet-stream"
        self._storage.put(place, data, content_type=kind)

    def delete(self, lines: Collection[int]) -> None:
        """Deletes the pictures of lines that have ended. Raises S3Unavailable.

        Those that S3 refuses to delete are not held either, or memory would grow with the dataset.
        """
        if lines:
            self.left += self._delete([self._held[line] for line in lines])
            for line in lines:
                del self._held[line]

    def sweep(self) -> None:
        """Deletes all that is left, also by processes that were killed; no line may be open.

        Raises S3Unavailable, S3Refused.
        """
        bucket, key = split_s3_uri(self.prefix)
        pages = Objects(self._storage).pages(bucket, key)
        self.left = sum(self._delete([each.uri for each in page.uploads]) for page in pages)
        self._held.clear()

    def _delete(self, places: Sequence[str]) -> int:
        """How many S3 refused to delete. Raises S3Unavailable."""
        bucket, _ = split_s3_uri(self.prefix)
        refused = 0
        for start in range(0, len(places), DELETED_AT_ONCE):
            keys = [split_s3_uri(each)[1] for each in places[start : start + DELETED_AT_ONCE]]
            try:
                with s3_errors(self.prefix):
                    answer = self._storage.client.delete_objects(
                        Bucket=bucket,
                        Delete={"Objects": [{"Key": key} for key in keys], "Quiet": True},
                    )
                refused += len(answer.get("Errors", ()))
            except S3Refused:
                refused += len(keys)
        return refused
