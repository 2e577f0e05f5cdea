"""Erasing jobs with what they left elsewhere: what to delete, in which order. Pure.

The records go last: while one is there, an erasure that was broken off can be repeated.
"""

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from blipq.contract import Status, split_s3_uri
from blipq.ledger.erasure import Erased
from blipq.s3.refusals import S3Refused
from blipq.s3.storage import Storage

log = logging.getLogger(__name__)

#: Removes images from a search index: its name, and their ids in it.
Unindex = Callable[[str, Sequence[str]], object]


@dataclass
class Forgotten:
    """What an erasure came to.

    jobs: ids whose records are gone. events: how many webhook events went with them. objects: S3
    objects that were deleted. entries: images that were removed from search indexes. left: what
    may still be there, each with why.
    """

    jobs: list[str] = field(default_factory=list)
    events: int = 0
    objects: list[str] = field(default_factory=list)
    entries: int = 0
    left: list[str] = field(default_factory=list)


class Forgetting:
    """One erasure: takes jobs, a chunk at a time, whose records are closed and not erased yet."""

    def __init__(self, storage: Storage, unindex: Unindex | None) -> None:
        self.report = Forgotten()
        self._storage = storage
        self._unindex = unindex

    def uploads(self, jobs: Sequence[Erased]) -> list[str]:
        """The images that clients uploaded: they go, unless open jobs name them.

        A tenant's job may have read what another tenant uploaded: that stays.
        """
        found: dict[str, None] = {}
        for job in jobs:
            if job.image is None or not self._is_upload(job.image):
                continue
            if job.is_part:
                self.report.left.append(f"{job.image}: the job named a part of it")
            elif job.tenant is None or self._is_upload(job.image, f"{job.tenant}/"):
                found[job.image] = None
            else:
                self.report.left.append(f"{job.image}: not in {job.tenant}'s part of the inbox")
        return [*found]

    def _is_upload(self, uri: str, folder: str = "") -> bool:
        if not uri.startswith("s3://"):
            return False
        bucket, key = split_s3_uri(uri)
        return bucket == self._storage.settings.inbox_bucket and key.startswith(folder)

    def clear(self, jobs: Sequence[Erased], uploads: Sequence[str], named: Collection[str]) -> None:
        """Deletes what lies elsewhere. Raises QueueUnavailable: the records are there still."""
        for uri in uploads:
            if uri in named:
                self.report.left.append(f"{uri}: an open job names it")
            else:
                self._delete(uri)
        for job in jobs:
            if job.result_uri is not None and job.result_uri != job.output:
                self._delete(job.result_uri)
            self._clear_output(job)
        self._clear_entries(jobs)

    def _clear_output(self, job: Erased) -> None:
        for uri in filter(None, (job.output, job.heat_map)):
            # A job that did not succeed may have named a place that was refused: it is not its own.
            if job.status is Status.SUCCEEDED:
                self._delete(uri)
            else:
                self.report.left.append(f"{uri}: job {job.id} may have written it")

    def _clear_entries(self, jobs: Sequence[Erased]) -> None:
        entries: dict[str, list[str]] = {}
        for job in jobs:
            if job.entry is not None:
                entries.setdefault(job.entry[0], []).append(job.entry[1])
        for name, ids in entries.items():
            if self._unindex is None:
                self.report.left += [f"{id}: in the index {name}" for id in ids]
            else:
                self._unindex(name, ids)
                self.report.entries += len(ids)

    def _delete(self, uri: str) -> None:
        try:
            self._storage.delete(uri)
        except S3Refused as error:
            self.report.left.append(f"{uri}: {error}")
        else:
            self.report.objects.append(uri)

    def erased(self, jobs: Sequence[Erased]) -> None:
        """Takes in that the records are gone."""
        for job in jobs:
            log.info("%s: forgotten, with %d events", job.id, job.events)
            self.report.jobs.append(job.id)
            self.report.events += job.events
