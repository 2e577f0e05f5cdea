"""Gives back what a dead front held: within a moment, not when leases have run out."""

import logging
import signal
import threading
from collections.abc import Sequence
from queue import SimpleQueue
from typing import Literal

from blipq.backoff import Backoff
from blipq.contract import ErrorCode, JobError
from blipq.errors import BlipqError
from blipq.ledger.codec import Message
from blipq.ledger.keys import model_of
from blipq.ledger.worker import Loss, WorkerLedger
from blipq.transport.broker import Broker
from blipq_worker.fronts.holdings import Holding
from blipq_worker.fronts.seat import EXIT_ENGINE_GONE, EXIT_SHUT_DOWN
from blipq_worker.process.heartbeat import EXIT_HUNG
from blipq_worker.process.metrics import WorkerMetrics

log = logging.getLogger(__name__)

Verdict = Loss | Literal["publish", "image_invalid"]

_OF_ITSELF = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)
#: In order: what such a front holds, Redis, being away, did not take back.
_IN_ORDER = (0, EXIT_ENGINE_GONE, EXIT_SHUT_DOWN)
_RETRIES = Backoff(0.1, 5.0)


def verdicts(holdings: Sequence[Holding], code: int) -> list[Verdict]:
    """What each job means to the death of a front that held them all. code: of its exit, or minus
    the signal.

    A job that may have ended the engine before stays suspect, however its front ended. A front that
    ends in order blames nobody. Otherwise a job that ran alone is to blame. So is the one whose
    picture was being decoded, if the decoder crashed or hung; of several all are suspects, and each
    runs alone from now on. One that merely was there is not, unless it happens to it again.
    """
    decoding = sum(each.stage == "decoding" for each in holdings)
    return [_verdict(each, code, decoding) for each in holdings]


def _verdict(holding: Holding, code: int, decoding: int) -> Verdict:
    if holding.token is None:
        return "publish"
    if holding.stage == "suspect":
        return "suspect"
    if code in _IN_ORDER:
        return "hand-back"
    by_decoder = holding.stage == "decoding" and (code == EXIT_HUNG or -code in _OF_ITSELF)
    if holding.solo:
        return "image_invalid" if by_decoder else "crash"
    if holding.stage == "decoding":
        return "crash" if by_decoder and decoding == 1 else "suspect"
    return "lost"


class Settler:
    """A thread that gives back what dead fronts held, through outages of Redis."""

    def __init__(self, ledger: WorkerLedger, broker: Broker, metrics: WorkerMetrics) -> None:
        self._ledger = ledger
        self._broker = broker
        self._metrics = metrics
        self._deaths: SimpleQueue[tuple[list[Holding], int] | None] = SimpleQueue()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="blipq-settler", daemon=True)
        self._thread.start()

    def settle(self, holdings: list[Holding], code: int) -> None:
        """Gives back what a front held that ended with ``code``. Does not wait."""
        if holdings:
            self._deaths.put((holdings, code))

    def close(self, timeout: float) -> None:
        """Gives back what it can in this time (seconds)."""
        self._deaths.put(None)
        self._thread.join(timeout)
        self._ended.set()

    def _run(self) -> None:
        while (death := self._deaths.get()) is not None:
            holdings, code = death
            log.warning("a front that ended with %d held %d jobs", code, len(holdings))
            self._settle_all(holdings, code)

    def _settle_all(self, holdings: list[Holding], code: int) -> None:
        waiting = []
        for holding, verdict in zip(holdings, verdicts(holdings, code), strict=True):
            try:
                waiting += self._heard(holding, verdict, code)
            except Exception:  # one of them must not keep the others
                log.exception("%s: cannot be given back: it waits for its lease's end", holding.id)
        if waiting:
            self._broker.publish_all(waiting)

    def _heard(self, holding: Holding, verdict: Verdict, code: int) -> list[Message]:
        """What is to be published, once Redis has answered: a lease that runs out meanwhile shows
        in the answer.
        """
        tries = 0
        while True:
            try:
                return self._settled(holding, verdict, code)
            except BlipqError as error:
                log.warning("%s: not given back yet: %s", holding.id, error)
                if self._ended.wait(_RETRIES.pause_s(tries)):
                    return []
                tries += 1

    def _settled(self, holding: Holding, verdict: Verdict, code: int) -> list[Message]:
        """Records a verdict; the messages of what waits now. Raises QueueUnavailable, QueueFull."""
        message = Message(holding.kind, holding.id, holding.queue)
        if verdict == "publish":
            # A claim may be on its way, or have been granted without an answer that came.
            withdrawn = {} if holding.nonce is None else {holding.nonce: holding.id}
            return [message] if not withdrawn else self._ledger.withdraw(withdrawn)
        assert holding.token is not None
        if verdict == "image_invalid":
            self._fail(holding, holding.token, code)
            return []
        waits = self._ledger.settle(holding.id, holding.token, verdict)
        log.warning("%s: %s: %s", holding.id, verdict, "waits again" if waits else "ended, or gone")
        if waits:
            self._metrics.done(holding.kind, "handed_back", {}, model=model_of(holding.queue))
        return [message] if waits else []

    def _fail(self, holding: Holding, token: str, code: int) -> None:
        why = f"decoding this image {_ended(code)} the process, also when it ran alone"
        error = JobError(code=ErrorCode.IMAGE_INVALID, message=why)
        if self._ledger.fail_lost(holding.id, token, error.model_dump_json()):
            log.error("%s: failed: %s: %s", holding.id, error.code, why)
            model = model_of(holding.queue)
            self._metrics.done(holding.kind, "failed", {}, error.code, model=model)


def _ended(code: int) -> str:
    return "hung" if code == EXIT_HUNG else f"crashed ({signal.Signals(-code).name})"
