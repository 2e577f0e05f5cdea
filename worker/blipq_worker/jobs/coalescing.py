"""Equal jobs that are in flight together are computed once."""

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import CancelledError, Future
from typing import Generic, Literal, TypeVar

from blipq.contract import ErrorCode
from blipq.errors import TransientError
from blipq.ledger.worker import Claim
from blipq_worker.claims import Held, Lost

Answer = TypeVar("Answer")


class EqualJobs(Generic[Answer]):
    """The first of several equal jobs leads: it computes, and the others wait for its answer.

    A leader that fails gives its followers nothing: each of them computes for itself. One that is
    lost, cancelled for instance, is followed by another of them.
    """

    def __init__(self, held: Held, timeout_s: float) -> None:
        self._held = held
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._leaders: dict[Hashable, Future[Answer | Literal["lost", "failed"]]] = {}

    def answer(
        self, key: Hashable, claim: Claim, compute: Callable[[], Answer]
    ) -> tuple[Answer, bool]:
        """The answer, and whether it is another job's.

        Raises what ``compute`` raises, Lost when the claim is gone, and TransientError when
        the other job takes too long.
        """
        while True:
            own: Future[Answer | Literal["lost", "failed"]] = Future()
            with self._lock:
                leader = self._leaders.setdefault(key, own)
            if leader is own:
                return self._lead(key, own, compute), False
            told = self._follow(leader, claim)
            if told == "failed":
                return compute(), False
            if told != "lost":
                return told, True

    def _lead(
        self,
        key: Hashable,
        own: "Future[Answer | Literal['lost', 'failed']]",
        compute: Callable[[], Answer],
    ) -> Answer:
        told: Answer | Literal["lost", "failed"] = "failed"
        try:
            told = answer = compute()
            return answer
        except (Lost, CancelledError):
            told = "lost"
            raise
        finally:
            with self._lock:  # before the followers hear of it: the next leader is one of them
                del self._leaders[key]
            own.set_result(told)

    def _follow(
        self, leader: "Future[Answer | Literal['lost', 'failed']]", claim: Claim
    ) -> Answer | Literal["lost", "failed"]:
        over = threading.Event()
        leader.add_done_callback(lambda _: over.set())
        self._held.on_lost(claim, over.set)
        if not over.wait(self._timeout_s):
            message = f"an equal job did not end within {self._timeout_s:g} s"
            raise TransientError(ErrorCode.INTERNAL, message)
        if self._held.event(claim).is_set():
            raise Lost
        return leader.result(timeout=0)
