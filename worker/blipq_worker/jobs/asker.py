"""How one job asks the model, and what it took."""

import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar, cast

from blipq.contract import ErrorCode, Priority
from blipq.errors import PermanentError, TransientError
from blipq.ledger.worker import Claim
from blipq_worker.blip2 import EmbedItem, GenerateItem, Item, MatchItem, ModelInfo, RankItem
from blipq_worker.claims import Held, Lost
from blipq_worker.engine.backend import Engine
from blipq_worker.receipt import Stopwatch
from blipq_worker.seam.requests import Answer, Embedded, Generated, Matched, ModelInfo, Ranked

#: Where the time of a pass is told in the receipt.
_STAGES: Mapping[type, str] = {
    GenerateItem: "generate_ms",
    RankItem: "generate_ms",
    MatchItem: "match_ms",
    EmbedItem: "embed_ms",
}


AnswerT = TypeVar("AnswerT")


def answer_of(future: "Future[AnswerT]", deadline: float, otherwise: str) -> AnswerT:
    """What a Future holds; TransientError (``otherwise``) if nothing until the deadline."""
    try:
        return future.result(timeout=max(0.0, deadline - time.monotonic()))
    except TimeoutError as error:
        if future.done():  # that is its answer
            raise
        raise TransientError(ErrorCode.INTERNAL, otherwise) from error


class Asker:
    """Sends a job's items to the engine and waits for the answers."""

    def __init__(
        self, engine: Engine, claim: Claim, held: Held, watch: Stopwatch, timeout_s: float
    ) -> None:
        self._engine = engine
        self._claim = claim
        self._held = held
        self._watch = watch
        self._timeout_s = timeout_s
        self._within = f"within {timeout_s:g} s"
        self.notes: list[str] = []
        self._vision_ms = 0.0
        self._expires_at = time.monotonic() + claim.expires_in
        self._priority = Priority(claim.queue.rsplit(".", 1)[-1])
        info = self.info
        watch.say(
            checkpoint=info.checkpoint,
            revision=info.revision,
            dtype=info.dtype,
            quantization=info.quantization,
        )

    @property
    def info(self) -> ModelInfo:
        """The served model."""
        return self._engine.model(self._claim.model).info

    def generate(self, item: GenerateItem) -> Generated:
        """Texts per prompt."""
        return cast(Generated, self.all([item])[0])

    def rank(self, item: RankItem) -> Ranked:
        """A log-likelihood per choice and prompt."""
        return cast(Ranked, self.all([item])[0])

    def match(self, item: MatchItem) -> Matched:
        """A score per text."""
        return cast(Matched, self.all([item])[0])

    def embed(self, item: EmbedItem) -> Embedded:
        """Features by name."""
        return cast(Embedded, self.all([item])[0])

    def all(self, items: Sequence[Item]) -> list[Any]:
        """The answers to several items, which may run together.

        Raises PermanentError: invalid_request for a text that is too long, model_unavailable for
        what the served model has no checkpoint for. TransientError if it does not answer in time.
        """
        model = self._engine.model(self._claim.model)
        for item in items:
            model.check(item)  # on this thread, so that it spoils no batch
        started = time.monotonic()
        answers = self._answers(items)
        passes = sum(answer.pass_ms for answer in answers)
        waited = (time.monotonic() - started) * 1000 - passes
        self._watch.add("wait_ms", max(0.0, waited))
        for item, answer in zip(items, answers, strict=True):
            self._record(item, answer)
        self._record_vision(items, answers)
        return [answer.value for answer in answers]

    def fits(self, item: Item) -> bool:
        """Whether the item's texts are short enough."""
        try:
            self._engine.model(self._claim.model).check(item)
        except PermanentError:
            return False
        return True

    def note(self, text: str) -> None:
        """Tells the caller something about the answer."""
        self.notes.append(text)

    def _record(self, item: Item, answer: Answer) -> None:
        self._watch.add(_STAGES[type(item)], answer.pass_ms)
        self._watch.say(batch_size=answer.batch_size)
        if isinstance(answer.value, Generated):
            texts = [text for texts in answer.value.texts for text in texts]
            self._watch.add("tokens", sum(text.tokens for text in texts))

    def _record_vision(self, items: Sequence[Item], answers: Sequence[Answer]) -> None:
        """The vision tower's part of the passes; a hit where it had nothing to do in any."""
        self._vision_ms += sum(answer.vision_ms for answer in answers)
        if any(item.pixels is not None for item in items):
            self._watch.say(vision_ms=self._vision_ms, cache_hit=self._vision_ms == 0)

    def _answers(self, items: Sequence[Item]) -> list[Answer]:
        """Waits for answers; a claim that is lost meanwhile, or expires, ends the work on them."""
        lost: threading.Event = self._held.event(self._claim)
        deadline = time.monotonic() + self._timeout_s
        futures: list[Future[Answer]] = []
        try:
            for item in items:
                future = self._engine.submit(
                    self._claim.model, item, self._priority, deadline=self._expires_at
                )
                futures.append(future)
                self._held.on_lost(self._claim, future.cancel)
            answers = [
                answer_of(future, deadline, f"the model did not answer {self._within}")
                for future in futures
            ]
        finally:
            for future in futures:
                future.cancel()
        if lost.is_set():
            raise Lost
        return answers
