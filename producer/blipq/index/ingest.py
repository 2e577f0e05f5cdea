"""Fills an index: what ``blipq index`` does. Needs no model: workers look at the images.

Nothing is noted between runs. What is in the index with the ETag that S3 lists is done; the rest is
submitted. So a run that was killed is simply run again, and submits again at most what was in
flight: to index an image again changes nothing.
"""

import itertools
import mimetypes
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from blipq.client.job import Job
from blipq.client.sync_client import Client
from blipq.contract import (
    EmbedRequest,
    ErrorCode,
    ImageRef,
    IndexEntry,
    Options,
    Priority,
    Status,
    no_s3_uri,
)
from blipq.errors import InvalidRequest, JobFailed
from blipq.index.store import Index, Indexes, Space
from blipq.s3.refusals import s3_errors

#: Images looked up, and jobs submitted and waited for, in one go.
_CHUNK = 256
_PROBE_TIMEOUT_S = 60.0
_SUBMIT_TIMEOUT_S = 600.0
_FAILURES_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Listed:
    """An object that S3 lists."""

    uri: str
    etag: str


@dataclass(slots=True)
class Tally:
    """What became of the images so far. ``failures`` are the first few, with why."""

    indexed: int = 0
    skipped: int = 0
    failed: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)

    @property
    def done(self) -> int:
        """Images that nothing more is to be done about."""
        return self.indexed + self.skipped + self.failed

    def fail(self, uri: str, why: str) -> None:
        """Counts an image that is not in the index."""
        self.failed += 1
        if len(self.failures) < _FAILURES_SHOWN:
            self.failures.append((uri, why))


class Prefix:
    """The images under ``s3://bucket/prefix``. Raises InvalidRequest.

    Objects with the endings of other types are left out; all others are tried.
    """

    def __init__(self, client: Client, source: str) -> None:
        self.uri = source
        self.bucket, _, self._prefix = source.removeprefix("s3://").partition("/")
        if not source.startswith("s3://") or not self.bucket:
            raise InvalidRequest(no_s3_uri(source, "s3://bucket/prefix"))
        self._client = client.storage.client

    def __iter__(self) -> Iterator[Listed]:
        pages = self._client.get_paginator("list_objects_v2")
        with s3_errors(self.uri):
            for page in pages.paginate(Bucket=self.bucket, Prefix=self._prefix):
                for found in page.get("Contents", ()):
                    if _may_be_image(found["Key"]):
                        yield Listed(f"s3://{self.bucket}/{found['Key']}", found["ETag"].strip('"'))

    def count(self) -> int:
        """The number of images under the prefix: a listing of all of it."""
        return sum(1 for _ in self)


def _may_be_image(key: str) -> bool:
    guessed, _ = mimetypes.guess_type(key)
    return not key.endswith("/") and (guessed is None or guessed.startswith("image/"))


class Indexer:
    """Puts what is under a prefix into an index, a window of jobs at a time."""

    def __init__(
        self,
        client: Client,
        known: Index | None,
        entry: Mapping[str, Any],
        options: Options,
        *,
        window: int,
    ) -> None:
        self.tally = Tally()
        self._client = client
        self._known = known
        self._entry = entry
        self._options = options
        self._chunk = min(_CHUNK, window)
        self._chunks_in_flight = max(1, window // self._chunk)

    def run(self, images: Iterable[Listed]) -> Iterator[Tally]:
        """Works on all images; the tally after each step."""
        in_flight: deque[tuple[list[Listed], list[Job[Any]]]] = deque()
        images = iter(images)
        while listed := list(itertools.islice(images, self._chunk)):
            new = self._new(listed)
            self.tally.skipped += len(listed) - len(new)
            in_flight.append((new, self._submit(new)))
            if len(in_flight) >= self._chunks_in_flight:
                self._settle(*in_flight.popleft())
            yield self.tally
        for chunk in in_flight:
            self._settle(*chunk)
            yield self.tally

    def _new(self, listed: list[Listed]) -> list[Listed]:
        """Those that are not in the index as they are."""
        if self._known is None:
            return listed
        etags = self._known.etags([image.uri for image in listed])
        return [image for image in listed if etags.get(image.uri) != image.etag]

    def _submit(self, images: Sequence[Listed]) -> list[Job[Any]]:
        requests = [
            EmbedRequest(
                image=ImageRef(uri=image.uri, etag=image.etag),
                index=IndexEntry(**self._entry),
            )
            for image in images
        ]
        return self._client.submit_many(requests, self._options, timeout=_SUBMIT_TIMEOUT_S)

    def _settle(self, images: Sequence[Listed], jobs: Sequence[Job[Any]]) -> None:
        """Waits until all jobs have ended, and counts them in the tally."""
        for image, job in zip(images, self._client.wait_all(jobs), strict=True):
            info = job.info()
            if info.status is Status.SUCCEEDED:
                self.tally.indexed += 1
            else:
                why = f"{info.error.code}: {info.error.message}" if info.error else info.status
                self.tally.fail(image.uri, why)


def known_index(client: Client, indexes: Indexes, name: str, model: str) -> Index | None:
    """The index as the model's workers see it now, or None if it has yet to be made.

    Raises JobFailed where the model cannot search at all, ResultTimeout where no worker answers.
    """
    probe = client.search(name, "a", top_k=1, rerank=0, model=model, priority=Priority.HIGH)
    try:
        found = probe.result(timeout=_PROBE_TIMEOUT_S)
    except JobFailed as error:
        if error.code is not ErrorCode.INVALID_REQUEST:
            raise
        return None
    return indexes.open(name, Space(found.checkpoint or "", found.revision or ""))
