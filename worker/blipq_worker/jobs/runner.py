"""One job's life on the worker: claim, fetch, decode, ask the model, finish."""

import logging
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError
from functools import partial
from typing import Any, NoReturn, TypeVar

from pydantic import ValidationError
from redis.exceptions import RedisError

from blipq.contract import (
    ErrorCode,
    ImageRef,
    JobError,
    Kind,
    Options,
    Request,
    request_adapter,
)
from blipq.errors import (
    InvalidRequest,
    PermanentError,
    QueueFull,
    QueueUnavailable,
    TransientError,
    WorkError,
)
from blipq.index.store import Indexes
from blipq.ledger.codec import Message
from blipq.ledger.worker import MAX_RETRIES, Claim, Unclaimed, WorkerLedger, new_nonce
from blipq.submission import Submission, checked, explain
from blipq.transport.broker import Broker
from blipq_worker.blip2 import Blip2, Pixels
from blipq_worker.claims import Held, Lost
from blipq_worker.engine.backend import Engine
from blipq_worker.engine.faults import is_out_of_memory
from blipq_worker.images.loader import Pictures
from blipq_worker.images.s3_access import AccessRefused, S3Access
from blipq_worker.index.writer import IndexWriter
from blipq_worker.jobs.coalescing import EqualJobs
from blipq_worker.jobs.index_asker import IndexAsker
from blipq_worker.jobs.outputs import Outputs
from blipq_worker.jobs.quarantine import Draining, Gate
from blipq_worker.kinds import handlers as kinds
from blipq_worker.messages.envelope import Malformed, encodable
from blipq_worker.process.metrics import Outcome, WorkerMetrics
from blipq_worker.receipt import Stopwatch
from blipq_worker.settings import WorkerSettings

log = logging.getLogger(__name__)

LONGEST_BACKOFF_S = 60.0
#: A thread takes no job for so long after S3 refused its worker.
REFUSED_PAUSE_S = 5.0
#: A job whose bucket alone refused its worker is tried again after so long.
PUT_OFF_S = 10.0
#: How often Redis is asked again while it is away.
FIRST_PAUSE_S, LAST_PAUSE_S = 0.1, 2.0
HAND_BACK_FOR_S = 10.0
#: The least time to a deadline that the ledger can count.
AT_ONCE_S = 0.001
#: What Redis answers while it is away, full or broken; the answer itself may have been lost.
UNAVAILABLE = (QueueUnavailable, RedisError)
UNHEARD = (*UNAVAILABLE, QueueFull)


AnswerT = TypeVar("AnswerT")

#: A result as JSON, and what a person should know about it.
Told = tuple[str, tuple[str, ...]]


class JobFailedTask(Exception):
    """Tells Celery that the job failed, so that its monitors show a failed task."""


class HandBack(Exception):
    """The message must go back to its queue: this worker cannot run it now."""


class Runner:
    """Runs jobs: one call of ``run`` per message, each on a thread of its own."""

    def __init__(
        self,
        *,
        ledger: WorkerLedger,
        broker: Broker,
        outputs: Outputs,
        access: S3Access,
        pictures: Pictures,
        engine: Engine,
        indexes: Indexes,
        writer: IndexWriter,
        gate: Gate,
        held: Held,
        metrics: WorkerMetrics,
        worker: str,
        settings: WorkerSettings,
    ) -> None:
        self._ledger = ledger
        self._broker = broker
        self._outputs = outputs
        self._access = access
        self._pictures = pictures
        self._engine = engine
        self._indexes = indexes
        self._writer = writer
        self._gate = gate
        self._held = held
        self._metrics = metrics
        self._worker = worker
        self._settings = settings
        self._equal: EqualJobs[Told] = EqualJobs(held, settings.job_timeout_s)

    def run(self, kind: Kind, id: str, request: Any = None, options: Any = None) -> None:
        """Runs the job of a message.

        ``request`` and ``options`` come in messages of foreign Celery clients: a job that the
        ledger does not know is recorded first. Raises JobFailedTask when the job failed, HandBack
        when the message must go back.
        """
        try:
            with self._gate.shared():
                claim = self._claim(kind, id, request, options)
                if claim is None:
                    return
                if not claim.solo:
                    self._work(claim)
                    return
        except Draining:
            raise HandBack from None
        self._work_alone(claim)

    def hand_back_all(self) -> int:
        """Gives every running job back, uncounted: another worker takes it at once.

        For HAND_BACK_FOR_S at most: the process may be about to end. What Redis has not taken by
        then stays held. Returns how many it took.
        """
        # First what is asked for: an answer that comes in between is among the claims.
        asked = self._held.asked()
        return self._hand_back_each([(claim, False) for claim in self._held.claims()], asked)

    def hand_back_lost(self) -> None:
        """Gives back what runs on a device that is lost.

        Uncounted; but who may have broken it runs alone from now on, and who did run alone keeps
        its lease: when that runs out, it is a crash.
        """
        given, unheard = [], self._held.asked()
        for claim in self._held.claims():
            asked = self._held.has_asked(claim)
            if asked and claim.solo:
                log.error("%s: the device was lost while it ran alone", claim.id)
            else:
                given.append((claim, asked))
        self._hand_back_each(given, unheard)

    # -- claim --

    def _claim(self, kind: Kind, id: str, request: Any, options: Any) -> Claim | None:
        """Takes the job, or None if there is nothing to do."""
        claim = self._asked(id)
        if claim == "unknown" and request is not None:
            try:
                self._heard(partial(self._adopt, kind, id, request, options), UNAVAILABLE)
            except QueueFull as error:  # there is room when jobs end, which needs this thread
                time.sleep(LAST_PAUSE_S)
                raise HandBack from error
            claim = self._asked(id)
        if claim == "newer":
            # It stays queued: the reconciler publishes it again, until a newer worker takes it.
            log.warning("%s: its contract is newer than this worker's: left in the queue", id)
            return None
        if not isinstance(claim, Claim):
            log.info("%s: nothing to do (%s)", id, claim)
            return None
        if claim.model not in self._engine.models:
            # A foreign client's message, in the queue of another model than its job is for.
            log.info("%s: not served here, goes to its queue: %s", id, claim.queue)
            self._hand_back(claim)
            self._held.remove(claim)
            return None
        return claim

    def _asked(self, id: str) -> Claim | Unclaimed:
        """The ledger's answer to a claim, which is held from then on.

        An answer that was lost may have been a claim: it is asked for again under its nonce. Raises
        HandBack if the worker stops meanwhile; the claim is withdrawn then.
        """
        nonce = new_nonce()
        ask = partial(
            self._ledger.claim, id, self._worker, lease_s=self._settings.lease_s, nonce=nonce
        )
        with self._held.asking(id, nonce):
            # Only now: what is asked for before the gate closes is seen by who closes it.
            if self._gate.closed:
                raise HandBack
            try:
                claim = self._heard(ask)
            except HandBack:
                self._withdraw({nonce: id}, time.monotonic() + HAND_BACK_FOR_S)
                raise
            if isinstance(claim, Claim):
                self._held.add(claim)
        return claim

    def _adopt(self, kind: Kind, id: str, request: Any, options: Any) -> None:
        """Records a job that a foreign client sent whole, or why it cannot be run."""
        try:
            parsed = _parsed({**request, "kind": kind} if isinstance(request, dict) else request)
            if not isinstance(options or {}, dict):
                raise InvalidRequest("options: must be an object")
            given = checked(Options, **(options or {}))
            recorded = self._ledger.submit(Submission(parsed, given, id), notify="foreign")
            if isinstance(recorded, str) and recorded != id:
                raise InvalidRequest(f"idempotency_key: it is that of the job {recorded}")
        except UNHEARD:
            raise
        except Exception as error:  # whatever it is, it is the message's fault
            log.warning("%s: %s", id, error)
            self._ledger.refuse(id, kind, _error(ErrorCode.INVALID_REQUEST, str(error)))

    def refuse(self, message: Malformed) -> None:
        """Records a malformed message as a failed job, if it names one that is not known yet.

        Raises QueueUnavailable and QueueFull.
        """
        log.error("%s: %s", message.id or "a message without a job", message)
        if message.id is None:
            self._metrics.refused("dropped")
            return
        error = _error(ErrorCode.INVALID_REQUEST, str(message))
        self._ledger.refuse(message.id, message.kind or Kind.CAPTION, error)
        self._metrics.refused("recorded")

    def cancel(self, id: str) -> bool:
        """Cancels a job that was revoked; False if the ledger does not know it or is away."""
        try:
            answer = self._ledger.cancel(id)
        except UNHEARD as error:
            log.warning("%s: revoked, and not cancelled yet: %s", id, error)
            return False
        log.info("%s: revoked (%s)", id, answer)
        return answer != "unknown"

    def cancel_sent(self, kind: Kind, id: str, request: Any = None, options: Any = None) -> bool:
        """Cancels a revoked job whose message has come: it may not have been recorded yet.

        False if the ledger does not know it or is away.
        """
        try:
            if request is not None:
                self._adopt(kind, id, request, options)
        except UNHEARD as error:
            log.warning("%s: revoked, and not recorded: %s", id, error)
        return self.cancel(id)

    def expire_sent(self, kind: Kind, id: str, request: Any = None, options: Any = None) -> None:
        """Records a job whose message had expired when it came, with a deadline that is over."""
        if request is None:  # the ledger has the job, and its deadline
            return
        if isinstance(options or {}, dict):
            options = {**(options or {}), "expires_in": AT_ONCE_S}
        try:
            log.info("%s: its message had expired", id)
            self._adopt(kind, id, request, options)
        except UNHEARD as error:
            log.warning("%s: expired, and not recorded: %s", id, error)

    def _heard(
        self, ask: Callable[[], AnswerT], unheard: tuple[type[Exception], ...] = UNHEARD
    ) -> AnswerT:
        """Asks the ledger until it answers; the question must be one that can be asked twice.

        Raises HandBack if the worker stops meanwhile.
        """
        pause = FIRST_PAUSE_S
        while True:
            try:
                return ask()
            except unheard as error:
                if self._gate.closed:
                    raise HandBack from error
            time.sleep(pause)
            pause = min(2 * pause, LAST_PAUSE_S)

    # -- work --

    def _work_alone(self, claim: Claim) -> None:
        """It may have killed its worker: it runs after the others have left, and before any come.

        Its lease is renewed while it waits for them, and a crash until then is not its own.
        """
        try:
            with self._gate.alone():
                if self._heard(partial(self._ledger.begin, claim)):
                    self._work(claim)
        except (Draining, HandBack):
            self._hand_back(claim)
        finally:
            self._held.remove(claim)

    def _work(self, claim: Claim) -> None:
        """Runs a claimed job to its outcome, or leaves it to whoever claims it next."""
        watch = Stopwatch(queue_ms=claim.queue_ms, worker=self._worker)
        try:
            result = self._answer(claim, watch)
            write = partial(self._ledger.succeed, claim, result, watch.receipt())
            self._finish(write, claim, watch, "succeeded")
        except Lost:
            log.info("%s: cancelled, expired or taken over", claim.id)
            self._metrics.done(claim.kind, "lost", watch.took)
        except PermanentError as error:
            self._fail(claim, error, watch)
        except AccessRefused as error:
            self._refused_access(claim, error, watch)
        except TransientError as error:
            self._retry(claim, error, watch)
        finally:
            self._held.remove(claim)

    def _answer(self, claim: Claim, watch: Stopwatch) -> str:
        """The job's result as JSON; every failure as a WorkError."""
        try:
            request = _parsed_json(claim.request)
            model = self._engine.model(claim.model)
            lost = self._held.event(claim)
            asker = self._asker(claim, model, watch, lost)
            image = kinds.image_of(request)
            self._outputs.check(claim, image)
            pixels = None
            if image is not None:
                needed = kinds.needed(request)
                pixels = self._pictures.load(image, model, needed, watch, lost)
            _raise_if(lost)
            result = self._told(claim, request, pixels, asker, watch)
            self._outputs.write(claim, result)
            return result
        except (WorkError, Lost):
            raise
        except CancelledError as error:
            raise Lost from error
        except TimeoutError as error:
            message = f"timed out: {error}"
            raise TransientError(ErrorCode.INTERNAL, message) from error
        except Exception as error:
            _raise_internal(claim, error)

    def _told(
        self,
        claim: Claim,
        request: Request,
        pixels: Pixels | None,
        asker: IndexAsker,
        watch: Stopwatch,
    ) -> str:
        """The result as JSON: computed here, or by an equal job that is in flight."""

        def compute() -> Told:
            result = kinds.answer(request, pixels, asker)
            return result.model_dump_json(exclude_none=True), tuple(asker.notes)

        if not kinds.is_repeatable(request):
            result, notes = compute()
        else:
            asked = request.model_dump_json(exclude={"image"})
            key = claim.queue, None if pixels is None else pixels.digest, asked
            (result, notes), shared = self._equal.answer(key, claim, compute)
            if shared:
                watch.say(shared=True)
        for note in notes:
            watch.note(note)
        return result

    def _asker(
        self, claim: Claim, model: Blip2, watch: Stopwatch, lost: threading.Event
    ) -> IndexAsker:
        def load(image: ImageRef) -> Pixels:
            """An image found in an index: the receipt counts it as part of the search."""
            unread = Stopwatch(queue_ms=0, worker=self._worker)
            return self._pictures.load(image, model, {"patches"}, unread, lost)

        return IndexAsker(
            self._engine,
            claim,
            self._held,
            watch,
            self._settings.job_timeout_s,
            indexes=self._indexes,
            writer=self._writer,
            load=load,
        )

    # -- outcome --

    def _fail(self, claim: Claim, error: WorkError, watch: Stopwatch) -> NoReturn:
        text = _error(error.code, str(error), retryable=error.retryable)
        write = partial(self._ledger.fail, claim, text, watch.receipt())
        self._finish(write, claim, watch, "failed", error)
        raise JobFailedTask(f"{error.code}: {error}") from error

    def _retry(self, claim: Claim, error: TransientError, watch: Stopwatch) -> None:
        if claim.retries >= MAX_RETRIES:
            self._fail(claim, error, watch)
        pause = min(self._settings.retry_backoff_s * 2**claim.retries, LONGEST_BACKOFF_S)
        pause *= random.uniform(0.5, 1.5)
        log.warning("%s: %s: again in %.1f s", claim.id, error, pause)
        text = _error(error.code, str(error), retryable=True)
        write = partial(self._ledger.retry, claim, pause, text)
        self._finish(write, claim, watch, "retried", error)

    def _refused_access(self, claim: Claim, error: AccessRefused, watch: Stopwatch) -> None:
        """S3 refuses this worker, so the job is another's, or this one's later: uncounted."""
        if self._access.is_refused(str(error)):
            self._hand_back(claim)
            time.sleep(REFUSED_PAUSE_S)  # so that workers in order find it first
        elif error.lasting is not None:
            self._fail(claim, PermanentError(error.lasting, str(error)), watch)
        else:  # it is about this job's bucket alone: no thread waits for that
            log.warning("%s: %s: again in %g s", claim.id, error, PUT_OFF_S)
            put_off = partial(self._ledger.hand_back, claim, PUT_OFF_S)
            self._finish(put_off, claim, watch, "handed_back")

    def _hand_back(self, claim: Claim) -> None:
        """Gives a job back, uncounted, through an outage of Redis if need be."""
        if self._taken_back(claim, time.monotonic() + claim.expires_in):
            self._broker.publish(_message(claim))

    def _hand_back_each(
        self, claims: Sequence[tuple[Claim, bool]], asked: Mapping[str, str]
    ) -> int:
        """Gives jobs back, each with whether it is suspect; how many Redis took in time.

        asked: claims whose answers have not come yet (nonce to id); these are not counted.
        """
        until = time.monotonic() + HAND_BACK_FOR_S
        count, given = 0, []
        for claim, suspect in claims:
            taken = self._taken_back(claim, until, suspect=suspect)
            if taken is None:
                log.error("not handed back in time: %d", len(claims) - count)
                break
            count += 1
            if taken:
                given.append(_message(claim))
        given += self._withdraw(asked, until)
        if given:  # at once: a broker that hangs takes its time once, not for each of them
            self._broker.publish_all(given)
        return count

    def _taken_back(self, claim: Claim, until: float, *, suspect: bool = False) -> bool | None:
        """Whether a job went back uncounted; None if Redis did not say so ``until`` (monotonic).

        Only its answer lets go of the claim. A lease that ran out while this process lives would
        count as a crash.
        """
        give = partial(self._ledger.hand_back, claim, suspect=suspect)
        taken = self._written(give, claim.id, until)
        if taken is None:
            return None
        if not self._held.remove(claim):  # another thread gave it back meanwhile
            return False
        if taken:
            log.info("%s: handed back", claim.id)
            self._metrics.done(claim.kind, "handed_back", {})
        return taken

    def _finish(
        self,
        write: Callable[[], bool],
        claim: Claim,
        watch: Stopwatch,
        outcome: Outcome,
        error: WorkError | None = None,
    ) -> None:
        """Stores an outcome, through an outage of Redis if need be: until the job's deadline.

        The claim stays held meanwhile, so that its lease is renewed as soon as Redis is back.
        """
        written = self._written(write, claim.id, time.monotonic() + claim.expires_in)
        if written is None:
            log.error("%s: expired with its outcome not stored", claim.id)
            return
        if not written:
            log.info("%s: its outcome came too late and is dropped", claim.id)
            outcome, error = "lost", None
        else:
            why = f": {error.code}: {error}" if error else ""
            log.info("%s: %s%s", claim.id, outcome.replace("_", " "), why)
        self._metrics.done(claim.kind, outcome, watch.took, error.code if error else "")

    def _withdraw(self, asked: Mapping[str, str], until: float) -> list[Message]:
        """Takes claims back that were asked for and not heard; messages of what waits now."""
        if not asked:
            return []
        withdraw = partial(self._ledger.withdraw, asked)
        return self._written(withdraw, ", ".join(asked.values()), until) or []

    def _written(self, write: Callable[[], AnswerT], what: str, until: float) -> AnswerT | None:
        """What Redis answers to a write that may be repeated; None if nothing ``until`` then."""
        pause = FIRST_PAUSE_S
        while True:
            try:
                return write()
            except UNHEARD as error:
                log.warning("%s: Redis has not taken what became of it: %s", what, error)
            left = until - time.monotonic()
            if left <= 0:
                return None
            time.sleep(min(pause, left))
            pause = min(2 * pause, LAST_PAUSE_S)


def _message(claim: Claim) -> Message:
    return Message(claim.kind, claim.id, claim.queue)


def _parsed_json(text: str) -> Request:
    try:
        return request_adapter.validate_json(text)
    except ValidationError as error:
        raise PermanentError(ErrorCode.INVALID_REQUEST, explain(error, Request)) from None


def _parsed(value: Any) -> Request:
    try:
        return request_adapter.validate_python(value)
    except ValidationError as error:
        raise PermanentError(ErrorCode.INVALID_REQUEST, explain(error, Request)) from None


def _error(code: ErrorCode, message: str, *, retryable: bool = False) -> str:
    error = JobError(code=code, message=encodable(message[:2000]), retryable=retryable)
    return error.model_dump_json()


def _raise_if(lost: threading.Event) -> None:
    if lost.is_set():
        raise Lost


def _raise_internal(claim: Claim, error: Exception) -> NoReturn:
    """A bug or a model's failure: the job fails at once, with the cause in the worker's log."""
    if is_out_of_memory(error):
        message = "the model ran out of memory on this job alone"
        raise PermanentError(ErrorCode.OUT_OF_MEMORY, message) from error
    log.error("%s: %s", claim.id, error, exc_info=error)
    message = f"{type(error).__name__}: {error}"
    raise PermanentError(ErrorCode.INTERNAL, message) from error
