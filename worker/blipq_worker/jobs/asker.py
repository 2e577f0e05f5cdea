"""How one job reaches the model, and what that took."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, wait
from contextlib import contextmanager
from typing import Any, TypeVar

from msgspec.structs import replace

from blipq.contract import ErrorCode, Priority
from blipq.errors import PermanentError, TransientError
from blipq.ledger.worker import Claim
from blipq.telemetry import names
from blipq.telemetry.trace import Trace
from blipq_worker.claims import Held, Lost
from blipq_worker.inference.interface import (
    EngineBusy,
    EngineGone,
    Inference,
    ItemFailed,
    UnknownModel,
)
from blipq_worker.inference.requests import Answer, Generated, ImagePixels, Item, ModelInfo
from blipq_worker.jobs.errors import EngineLost
from blipq_worker.kinds.spec import Part
from blipq_worker.receipt import Stopwatch

MadeT = TypeVar("MadeT")
AnswerT = TypeVar("AnswerT")

#: What an engine had begun is known as soon as one of its items is known to be lost: of the others
#: at most so long later.
_SETTLED_S = 5.0

#: Has an image's pixels made, whatever the model knows of it.
Reload = Callable[[], ImagePixels]


def answer_of(future: "Future[AnswerT]", deadline: float, otherwise: str) -> AnswerT:
    """What a Future holds; TransientError (``otherwise``) if nothing until the deadline."""
    try:
        return future.result(timeout=max(0.0, deadline - time.monotonic()))
    except TimeoutError as error:
        if future.done():  # that is its answer
            raise
        raise TransientError(ErrorCode.INTERNAL, otherwise) from error


@contextmanager
def engine_errors() -> Iterator[None]:
    """The errors of an ``Inference`` as a worker's; a cancelled item raises CancelledError."""
    try:
        yield
    except UnknownModel as error:
        raise PermanentError(ErrorCode.MODEL_UNAVAILABLE, str(error)) from error
    except EngineGone as error:
        raise EngineLost(str(error), started=error.started) from error
    except EngineBusy as error:
        raise TransientError(ErrorCode.INTERNAL, f"the engine: {error}") from error
    except ItemFailed as error:
        failure = error.failure
        if failure.kind == "cancelled":
            raise CancelledError from error
        lasting = failure.kind in ("permanent", "internal")
        wrapped = PermanentError if lasting else TransientError
        raise wrapped(ErrorCode(failure.code), failure.message) from error


def has_begun(futures: Sequence["Future[Answer]"]) -> bool:
    """Whether one of these items of an engine that is gone was in a pass that had begun."""
    _, unsettled = wait(futures, _SETTLED_S)
    errors = [
        each.exception() for each in futures if each not in unsettled and not each.cancelled()
    ]
    return any(isinstance(error, EngineGone) and error.started for error in errors)


def _note_passes(span: Trace, answers: Sequence[Answer]) -> None:
    """Links the span of a job's wait for the model to those of the passes that answered it."""
    for passed in {answer.span for answer in answers} - {"", span.context}:
        span.link(passed)
    if any(answer.shared for answer in answers):
        span.set_attributes({names.SHARED: True})


class Asker:
    """Sends a job's items to the engine and waits for the answers.

    reload: has the pixels of the job's image made; for an engine that has forgotten it meanwhile.
    """

    def __init__(
        self,
        inference: Inference,
        claim: Claim,
        held: Held,
        watch: Stopwatch,
        timeout_s: float,
        *,
        reload: Reload,
    ) -> None:
        self._inference = inference
        self._claim = claim
        self._held = held
        self._watch = watch
        self._timeout_s = timeout_s
        self._within = f"within {timeout_s:g} s"
        self._reload = reload
        self.notes: list[str] = []
        self._was_spared = self._had_passes = False
        self._vision_ms = 0.0
        self._expires_at = time.monotonic() + claim.expires_in
        self._span = watch.trace
        self._priority = Priority(claim.queue.rsplit(".", 1)[-1])
        info = self.info
        watch.record(
            checkpoint=info.checkpoint,
            revision=info.revision,
            dtype=info.dtype,
            quantization=info.quantization,
        )

    @property
    def info(self) -> ModelInfo:
        """The served model."""
        with engine_errors():
            return self._inference.model(self._claim.model)

    def one(self, part: Part[MadeT]) -> MadeT:
        """What a part comes to. Raises as ``all``."""
        made: MadeT = self.all([part])[0]
        return made

    def all(self, parts: Sequence[Part[Any]]) -> list[Any]:
        """What several parts come to, which may run together.

        Raises PermanentError: invalid_request for a text that is too long, model_unavailable for
        what the served model has no checkpoint for. TransientError if it does not answer in time.
        """
        items = [part.item for part in parts]
        with engine_errors():
            for item in items:
                self._inference.check(self._claim.model, item)
            started = time.monotonic()
            with self._watch.trace.child(names.MODEL) as self._span:
                answers = self._answers(items)
                _note_passes(self._span, answers)
        own = [answer for answer in answers if not answer.shared]
        passes = sum(answer.pass_ms for answer in own)
        waited = (time.monotonic() - started) * 1000 - passes
        self._watch.add("wait_ms", max(0.0, waited))
        for part, answer in zip(parts, answers, strict=True):
            if not answer.shared:  # else its pass is in the receipt of the job that it ran for
                self._record(part, answer)
        return [part.made(each.value) for part, each in zip(parts, answers, strict=True)]

    def fits(self, item: Item) -> bool:
        """Whether the item's texts are short enough."""
        try:
            self._inference.check(self._claim.model, item)
        except ItemFailed:
            return False
        return True

    @property
    def shared(self) -> bool:
        """Whether all that it was answered was computed for other jobs."""
        return self._was_spared and not self._had_passes

    def note(self, text: str) -> None:
        """Adds to the receipt what a person should know about the answer."""
        self.notes.append(text)

    def _record(self, part: Part[Any], answer: Answer) -> None:
        self._watch.add(f"{part.stage}_ms", answer.pass_ms)
        self._watch.add("gpu_ms", answer.device_ms)
        self._watch.record(batch_size=answer.batch_size)
        if isinstance(answer.value, Generated):
            texts = [text for texts in answer.value.texts for text in texts]
            self._watch.add("tokens", sum(text.tokens for text in texts))
        if part.item.image is not None:  # a hit: the vision tower had nothing to do for any part
            self._vision_ms += answer.vision_ms
            self._watch.record(vision_ms=self._vision_ms, cache_hit=self._vision_ms == 0)

    def _answers(self, items: Sequence[Item]) -> list[Answer]:
        deadline = time.monotonic() + self._timeout_s
        futures: list[Future[Answer]] = []
        try:
            for item in items:  # all are sent before any is waited for
                futures.append(self._submitted(item))
            return [
                self._answer(item, future, deadline, self._reload)
                for item, future in zip(items, futures, strict=True)
            ]
        except EngineGone as error:
            # It came of whichever item was first; another one may be the one that had begun.
            raise EngineGone(str(error), started=error.started or has_begun(futures)) from error
        finally:
            for future in futures:
                future.cancel()

    def _submitted(self, item: Item) -> "Future[Answer]":
        """Sends an item. A claim that is lost meanwhile, or expires, ends the work on it."""
        future = self._inference.submit(
            self._claim.model,
            item,
            self._priority.value,
            deadline=self._expires_at,
            alone=self._claim.solo,
            trace=self._span.context,
        )
        self._held.on_lost(self._claim, future.cancel)
        return future

    def _answer(
        self, item: Item, future: "Future[Answer]", deadline: float, reload: Reload
    ) -> Answer:
        """Waits for an answer. An item that came without pixels may need them after all: once.

        Raises TransientError (image_changed) where other bytes lie there by then: the job's other
        items are about the image as it was.
        """
        try:
            return self._noted(self._waited(future, deadline, "the model"))
        except ItemFailed as error:
            if error.failure.kind != "image_unknown":
                raise
        image = reload()
        if item.image is None or image.digest != item.image.digest:
            message = "the image was replaced while the job ran"
            raise TransientError(ErrorCode.IMAGE_CHANGED, message)
        again = self._submitted(replace(item, image=image))
        return self._noted(self._waited(again, deadline, "the model"))

    def _noted(self, answer: Answer) -> Answer:
        """Notes whose pass it was, as soon as it has ended; on any thread."""
        if answer.shared:
            self._was_spared = True
            return answer
        self._had_passes = True
        if answer.first_token_ms:
            self._watch.record_first_token(answer.pass_ms - answer.first_token_ms)
        return answer

    def _waited(self, future: "Future[AnswerT]", deadline: float, who: str) -> AnswerT:
        """What a Future holds. Raises Lost where the claim was lost meanwhile."""
        lost: threading.Event = self._held.event(self._claim)
        try:
            answer = answer_of(future, deadline, f"{who} did not answer {self._within}")
        finally:
            future.cancel()
        if lost.is_set():
            raise Lost
        return answer
