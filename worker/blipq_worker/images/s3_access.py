"""Whether S3 takes this worker's credentials: for ``/readyz``, and for jobs that it refuses."""

import logging
import threading
import time

from blipq.contract import ErrorCode
from blipq.errors import QueueUnavailable, TransientError
from blipq.s3.storage import Storage

log = logging.getLogger(__name__)

#: The least time between two checks of S3.
ASK_EVERY_S = 5.0


class AccessRefused(TransientError):
    """S3 refuses the worker, not the job: its credentials, account, clock or region are wrong.

    The job goes back to its queue, uncounted. ``lasting``: the code that it fails with if S3 takes
    the worker, and goes on to refuse the job's bucket; None where that may pass.
    """

    def __init__(self, message: str, lasting: ErrorCode | None = None) -> None:
        super().__init__(ErrorCode.IMAGE_UNAVAILABLE, message)
        self.lasting = lasting


class S3Access:
    """What is known of the credentials. Thread-safe."""

    def __init__(self, storage: Storage, *, ask_every_s: float = ASK_EVERY_S) -> None:
        self._storage = storage
        self._ask_every_s = ask_every_s
        self._asking = threading.Lock()
        self._known = False
        self._trouble: str | None = None
        self._checked_at = float("-inf")

    def is_refused(self, why: str) -> bool:
        """After a job was refused: whether S3 refuses this worker as such.

        It does unless it says otherwise. Checked at once: it may be about the job's bucket alone.
        """
        began = time.monotonic()
        with self._asking:
            if self._checked_at < began:  # else another thread has just checked
                self._ask(otherwise=why)
            return self._trouble is not None

    def trouble(self) -> str | None:
        """Why S3 refuses this worker, or None. Asks S3 until it is known to take it."""
        if self._known and self._trouble is None:
            return None
        # One thread checks; the others use what was known before.
        if self._asking.acquire(blocking=False):
            try:
                if time.monotonic() - self._checked_at >= self._ask_every_s:
                    self._ask(otherwise=self._trouble)
            finally:
                self._asking.release()
        return self._trouble

    def _ask(self, *, otherwise: str | None) -> None:
        """``otherwise``: what is assumed where S3 does not answer."""
        before = self._trouble
        try:
            self._trouble = self._storage.refused_access()
            self._known = True
        except QueueUnavailable as error:
            log.warning("S3 did not say whether it takes this worker: %s", error)
            self._trouble = otherwise
        self._checked_at = time.monotonic()
        if self._trouble is not None and before is None:
            log.error("S3 refuses this worker: %s", self._trouble)
        elif self._trouble is None and before is not None:
            log.info("S3 takes this worker again")
