"""What jobs took of the device, on its way to the ledger: added up, and written once a beat."""

import json
import threading
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from blipq.ledger.worker import Claim, WorkerLedger


class Usage:
    """Thread-safe. It holds one entry for each shape and tenant of a beat, not for each job."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ran: dict[tuple[str, str], list[float]] = {}
        self._used: dict[tuple[str, str], float] = {}
        self._empty()

    def _empty(self) -> None:
        self._ran = defaultdict(lambda: [0, 0.0, 0, 0.0, 0.0])
        self._used = defaultdict(float)

    def add(self, claim: Claim, took: Mapping[str, Any], run_ms: float, *, succeeded: bool) -> None:
        """Adds a job that has run. took: what its receipt has; run_ms: since its claim.

        All that ran is somebody's use; only what succeeded says what such jobs take. One that was
        answered by another's pass took nothing, and says so, too.
        """
        gpu_ms = took.get("gpu_ms", 0.0)
        with self._lock:
            if gpu_ms:
                self._used[claim.model, claim.tenant] += gpu_ms
            if succeeded and claim.work:
                ran = self._ran[claim.model, claim.work]
                place = 2 if took.get("cache_hit") else 0
                ran[place] += 1
                ran[place + 1] += gpu_ms
                ran[4] += run_ms

    def flush(self, ledger: WorkerLedger) -> None:
        """Writes what was added since. Raises QueueUnavailable and QueueFull.

        What Redis does not confirm is not written again: it may have been, and nobody is to pay
        twice.
        """
        with self._lock:
            ran, used = self._ran, self._used
            self._empty()
        if ran or used:
            learned = {
                "ran": [[*about, *sums] for about, sums in ran.items()],
                "used": [[*about, ms] for about, ms in used.items()],
            }
            ledger.learn(json.dumps(learned))
