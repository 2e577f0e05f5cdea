"""One job of each upload that a rule takes: recorded first, then acknowledged to the source.

Whatever dies or does not answer in between, the source delivers the upload again, and its
idempotency key finds the job that is there.
"""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from blipq.client.recording import AWAY, record_all
from blipq.client.sync_client import Client
from blipq.contract import split_s3_uri
from blipq.errors import (
    BlipqError,
    IdempotencyConflict,
    InvalidRequest,
    QueueFull,
    QueueUnavailable,
)
from blipq.ledger.cells.operator import operator_of
from blipq.s3.refusals import OF_THE_ASKER, S3Refused
from blipq.submission import Submission
from blipq.watch.objects import Objects, Upload
from blipq.watch.rules import Rule, Rules
from blipq.watch.sources import Batch, Found, Source

log = logging.getLogger(__name__)

#: HEAD requests to S3 at the same time.
HEAD_REQUESTS = 10
#: Pause between two reads of a full window.
ROOM_EVERY_S = 1.0
#: Refused uploads that are remembered, so that each is logged once.
REFUSED_KEPT = 10_000

AnswerT = TypeVar("AnswerT")


class Stopped(Exception):
    """Stopped in the middle of a batch, which the source will deliver again."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A job that a rule makes of an upload."""

    found: Found
    upload: Upload
    rule: Rule
    submission: Submission


@dataclass
class Counts:
    """What came of everything that was found."""

    submitted: int = 0
    known: int = 0
    left_out: int = 0
    refused: int = 0


@dataclass
class Watcher:
    """Takes uploads from a source until ``stop`` is set.

    ``report`` is called with each job: its id, or None in a dry run, which submits nothing and
    leaves everything to the source. ``window``: a backfill waits while so many jobs are open.
    """

    rules: Rules
    client: Client
    stop: threading.Event
    report: Callable[[Wanted, str | None], None]
    dry_run: bool = False
    window: int | None = None
    counts: Counts = field(default_factory=Counts)

    def __post_init__(self) -> None:
        self.objects = Objects(self.client.storage)
        self._operator = operator_of(self.client.ledger)
        self._refused: dict[Found, None] = {}
        self._pool = ThreadPoolExecutor(HEAD_REQUESTS, thread_name_prefix="blipq-watch")

    def run(self, source: Source, *, once: bool = False) -> None:
        """Takes what the source has; with ``once`` until it has nothing."""
        try:
            while not self.stop.is_set():
                batch = self._patiently(source.next)
                if batch is not None:
                    self._take(batch)
                elif once:
                    return
                else:
                    self.stop.wait(source.pause_s)
        except Stopped:
            log.info("stopped; what is not recorded yet comes again")
        finally:
            source.close()

    def _take(self, batch: Batch) -> None:
        """Records a batch and acknowledges it."""
        refused: set[Found] = set()
        uploads = self._pool.map(lambda found: self._upload(found, batch), batch.found)
        wanted: list[Wanted] = []
        for found, upload in zip(batch.found, uploads, strict=True):
            try:
                wanted += self._wanted(found, upload)
            except InvalidRequest as error:
                self._refuse(found, error, refused)
        if self.window is not None:
            wanted = self._missing(wanted, batch)
            self._wait_for_room(self.window)
        self._record(wanted, batch, refused)
        if not self.dry_run:
            self._patiently(lambda: batch.done(refused), batch)

    # -- which uploads --

    def _upload(self, found: Found, batch: Batch) -> Upload | InvalidRequest | None:
        """The object as it is now; None if it is gone, or no rule could take it."""
        if not self.rules.may_take(found.bucket, found.key):
            return None
        if isinstance(found, Upload) and not self.rules.need_types:
            return found
        version = found.version_id
        try:
            return self._patiently(
                lambda: self.objects.head(found.bucket, found.key, version), batch
            )
        except S3Refused as error:
            if error.refusal in OF_THE_ASKER:
                raise  # it is not about this upload: the source will deliver it again
            return error

    def _wanted(self, found: Found, upload: Upload | InvalidRequest | None) -> list[Wanted]:
        if isinstance(upload, InvalidRequest):
            raise upload
        wanted = []
        for rule in self.rules.rules:
            if upload is not None and rule.takes(upload):
                request, options = rule.job(upload, watch=self.rules.name)
                job = Submission(request, options, tenant=self.client.settings.tenant)
                wanted.append(Wanted(found, upload, rule, job))
        if not wanted:
            self.counts.left_out += 1
        return wanted

    def _missing(self, wanted: list[Wanted], batch: Batch) -> list[Wanted]:
        """Those without a sidecar that is newer than the upload."""
        there = list(self._pool.map(lambda each: self._has_sidecar(each, batch), wanted))
        self.counts.left_out += sum(there)
        return [each for each, has in zip(wanted, there, strict=True) if not has]

    def _has_sidecar(self, wanted: Wanted, batch: Batch) -> bool:
        output = wanted.submission.options.output
        if output is None:
            return False
        bucket, key = split_s3_uri(output)
        try:
            sidecar = self._patiently(lambda: self.objects.head(bucket, key), batch)
        except InvalidRequest:  # only the worker may look there
            return False
        return sidecar is not None and sidecar.modified >= wanted.upload.modified

    def _wait_for_room(self, window: int) -> None:
        while not self.dry_run and self._patiently(self._operator.open_jobs) >= window:
            if self.stop.wait(ROOM_EVERY_S):
                raise Stopped

    # -- jobs --

    def _record(self, wanted: list[Wanted], batch: Batch, refused: set[Found]) -> None:
        if self.dry_run:
            for each in wanted:
                self.report(each, None)
            return
        submissions = [each.submission for each in wanted]
        answers = record_all(
            self.client, submissions, lambda why, seconds: self._wait(why, seconds, batch)
        )
        for each, answer in zip(wanted, answers, strict=True):
            if isinstance(answer, str):
                self._recorded(each, answer)
            elif isinstance(answer, IdempotencyConflict):
                self.counts.known += 1  # it had its job before the rule was changed
            else:
                self._refuse(each.found, answer, refused)

    def _recorded(self, wanted: Wanted, id: str) -> None:
        if id == wanted.submission.id:
            self.counts.submitted += 1
            self.report(wanted, id)
        else:
            self.counts.known += 1

    def _refuse(self, found: Found, error: BlipqError, refused: set[Found]) -> None:
        """Logged and counted once, however often a source delivers it again."""
        refused.add(found)
        if found in self._refused:
            return
        log.error("s3://%s/%s can have no job: %s", found.bucket, found.key, error)
        self.counts.refused += 1
        self._refused[found] = None
        if len(self._refused) > REFUSED_KEPT:
            del self._refused[next(iter(self._refused))]

    # -- trouble --

    def _patiently(self, action: Callable[[], AnswerT], batch: Batch | None = None) -> AnswerT:
        """Does it, however long Redis, S3 or the queue are away. Raises Stopped."""
        tries = 0
        while True:
            try:
                return action()
            except (QueueUnavailable, QueueFull) as error:
                self._wait(error, AWAY.pause_s(tries), batch)
            tries += 1

    def _wait(self, why: BlipqError, seconds: float, batch: Batch | None) -> None:
        log.warning("%s; again in %.1f s", why, seconds)
        if batch is not None:
            batch.hold()
        if self.stop.wait(seconds):
            raise Stopped
