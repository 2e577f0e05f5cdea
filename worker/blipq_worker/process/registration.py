"""A worker's entry in the registry: that it lives, what it serves, and whether it has room."""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

from blipq.contract import CONTRACT
from blipq.ledger.worker import WorkerLedger


@dataclass(frozen=True, slots=True)
class State:
    """How a worker is. threads: jobs that it can hold; active: those that it holds. taking: whether
    a message that comes now would be run at once. decode_bound: whether its model waits for
    images to be decoded.
    """

    threads: int
    active: int
    taking: bool
    draining: bool
    decode_bound: bool = False


class Registration:
    """Renews the entry. ttl_s: how long a worker counts as live after a beat."""

    def __init__(
        self,
        ledger: WorkerLedger,
        worker: str,
        *,
        outputs: Sequence[str],
        grace_s: float,
        ttl_s: float,
    ) -> None:
        self._ledger = ledger
        self._worker = worker
        self._outputs = list(outputs)
        self._grace_s = grace_s
        self._ttl_s = ttl_s
        self._started = time.time()
        self._room_since: float | None = None

    def renew(self, models: Sequence[str], state: State, **more: object) -> None:
        """One beat; ``more`` is for people. Raises what the ledger raises."""
        info = {
            "pid": os.getpid(),
            "models": list(models),
            "contract": CONTRACT,
            "outputs": self._outputs,
            "threads": state.threads,
            "active": state.active,
            "draining": state.draining,
            "decode_bound": state.decode_bound,
            "started_at": self._started,
            **more,
        }
        served = [] if state.draining else models
        spare = self._had_room(state)
        self._ledger.register(
            self._worker, served, json.dumps(info), ttl_s=self._ttl_s, spare=spare
        )

    def _had_room(self, state: State) -> bool:
        """Whether it had room at each beat of a whole grace: what waits then, it was not sent."""
        if state.active >= state.threads or not state.taking:
            self._room_since = None
            return False
        now = time.monotonic()
        self._room_since = self._room_since or now
        return now - self._room_since >= self._grace_s
