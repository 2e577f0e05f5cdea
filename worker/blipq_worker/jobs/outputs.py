"""Writes a job's result to S3 for as long as the job is this worker's.

S3 knows nothing of claims. So the order is: look at what is there, make sure of the claim for
longer than a write can take, write on condition that the same is there still. A worker that is
frozen before its write then finds another's newer answer and leaves it alone.
"""

import hashlib
import logging
import time
from typing import Any

from blipq.contract import ErrorCode, ImageRef, heat_map_place, split_s3_uri
from blipq.errors import PermanentError, QueueFull, QueueUnavailable, TransientError
from blipq.ledger.worker import Claim, WorkerLedger
from blipq.s3.outputs import lies_in, why_refused
from blipq.s3.refusals import Refusal, S3Refused
from blipq.s3.storage import Storage
from blipq.settings import Settings
from blipq_worker.claims import Lost
from blipq_worker.jobs.index_asker import work_errors
from blipq_worker.settings import WorkerSettings

log = logging.getLogger(__name__)

#: Redis may be away for so long before the job is put back.
CONFIRM_FOR_S = 60.0
PAUSE_S = 0.2
#: How often another writer may be faster.
TRIES = 3
#: botocore waits so long for leave to send a body.
_EXPECT_S = 1.0


def output_storage(settings: Settings, options: WorkerSettings) -> Storage:
    """A client whose writes end, one way or the other, well within a lease."""
    room = max(0.1, 0.9 * options.lease_s - _EXPECT_S)
    return Storage(
        settings,
        max_connections=options.threads,
        connect_timeout_s=min(3.0, 0.2 * room),
        read_timeout_s=min(10.0, 0.4 * room),  # to send, and for the answer
        attempts=1,
    )


class Outputs:
    """Writes results. ``storage``: as ``output_storage`` makes it."""

    def __init__(self, storage: Storage, ledger: WorkerLedger, options: WorkerSettings) -> None:
        self._storage = storage
        self._ledger = ledger
        self._allowed = options.allowed_outputs
        self._results = options.results
        self._result_bytes = options.result_bytes
        self._lease_s = options.lease_s

    def check(self, claim: Claim, image: ImageRef | None, *, drawn: bool = False) -> None:
        """Raises PermanentError (invalid_request) if the job's output may not be written.

        drawn: its heat maps are written beside it.
        """
        if not claim.output:
            return
        for uri in (claim.output, *([heat_map_place(claim.output)] if drawn else [])):
            if (why := self._why_refused(uri, image)) is not None:
                raise PermanentError(ErrorCode.INVALID_REQUEST, f"output: {why}")

    def _why_refused(self, uri: str, image: ImageRef | None) -> str | None:
        try:
            why = why_refused(uri, self._allowed, self._storage.settings, image)
        except ValueError as error:  # of the longer name beside an output: that was checked before
            return f"{uri}: {error}"
        if why is None and self._results and lies_in(uri, self._results):
            why = f"{uri} is among the results of other jobs (BLIPQ_RESULTS)"
        return why

    def write(self, claim: Claim, result: str) -> None:
        """Writes the result of a job that has an output.

        Raises Lost when the claim is gone, and WorkError.
        """
        if claim.output:
            self._write(claim, claim.output, result.encode(), "application/json")

    def write_heat_map(self, claim: Claim, png: bytes) -> None:
        """Writes what lies beside the output. Before that: who sees the output finds both.

        Raises as ``write``.
        """
        self._write(claim, heat_map_place(claim.output), png, "image/png")

    def place(self, claim: Claim, result: str) -> str | None:
        """Where a result is that is too large for the ledger, None for any other.

        It is written there, unless it is at the job's output already. Raises as ``write``.
        """
        if self._results is None or len(result.encode()) <= self._result_bytes:
            return None
        if claim.output:
            return claim.output
        # An id may have any printable characters.
        name = hashlib.sha256(claim.id.encode()).hexdigest()
        uri = f"{self._results.rstrip('/')}/{name}.json"
        self._write(claim, uri, result.encode(), "application/json")
        return uri

    def _write(self, claim: Claim, uri: str, data: bytes, content_type: str) -> None:
        for _ in range(TRIES):
            with work_errors("output"):
                # Before the claim is checked: what a later owner writes is then another thing.
                there = self._there(uri)
            self._confirm(claim)
            with work_errors("output"):
                if self._storage.put_over(uri, data, there, content_type=content_type):
                    return
        raise TransientError(ErrorCode.INTERNAL, f"output: others keep writing {uri}")

    def _there(self, uri: str) -> str | None:
        """The ETag of what is there, "" if nothing is, None if that may not be seen."""
        try:
            found: Any = self._storage.head(*split_s3_uri(uri))
        except S3Refused as error:
            if error.refusal is not Refusal.FORBIDDEN:
                raise
            return None
        return "" if found is None else str(found["ETag"])

    def _confirm(self, claim: Claim) -> None:
        """Renews the claim for longer than a write can take. Raises Lost if it is gone."""
        until = time.monotonic() + CONFIRM_FOR_S
        while True:
            asked_at = time.monotonic()
            try:
                lost = self._ledger.renew({claim.id: claim.token}, lease_s=self._lease_s)
            except (QueueUnavailable, QueueFull) as error:
                why = str(error)
                log.warning("%s: its output waits: %s", claim.id, error)
            else:
                if lost:
                    raise Lost
                # The lease runs from when Redis renewed it, at the earliest from the call.
                left = self._lease_s - (time.monotonic() - asked_at)
                if left > self._storage.longest_write_s + _EXPECT_S:
                    return
                why = f"{left:.1f} s of the lease are too few for a write (BLIPQ_LEASE_S)"
            if time.monotonic() > until:
                raise TransientError(ErrorCode.INTERNAL, f"output: {why}")
            time.sleep(PAUSE_S)
