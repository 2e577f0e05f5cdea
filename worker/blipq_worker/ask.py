"""How one job asks the model, and what it took."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from blipq.contract import Priority, Receipt
from blipq.ledger import Claim
from blipq_worker.blip2 import EmbedItem, GenerateItem, MatchItem, ModelInfo, RankItem
from blipq_worker.engine import Embedded, Engine, Generated, Item, ItemAnswer, Matched, Ranked
from blipq_worker.leases import Held

DEMO = "demo"
DEMO_LARGEST_PX = 256
DEMO_NOTE = (
    "the demo model only knows coloured shapes on a plain background; "
    "serve a real model for photos (BLIPQ_MODELS=default=opt-2.7b)"
)


class Lost(Exception):
    """The claim is gone: cancelled, expired or taken over. Nobody wants the answer."""


class Stopwatch:
    """Collects a job's receipt."""

    def __init__(self, *, queue_ms: float, worker: str) -> None:
        self._fields: dict[str, float | int | str] = {"queue_ms": queue_ms, "worker": worker}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times a stage."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.add(f"{name}_ms", (time.monotonic() - started) * 1000)

    def add(self, name: str, amount: float) -> None:
        """Adds to a number."""
        self._fields[name] = cast("float", self._fields.get(name, 0)) + amount

    def say(self, **facts: float | int | str) -> None:
        """Sets facts."""
        self._fields.update(facts)

    def note(self, checkpoint: str, size: tuple[int, int]) -> None:
        """Warns who sent a photo to the demo model: its own pictures are small."""
        if checkpoint == DEMO and max(size) > DEMO_LARGEST_PX:
            self.say(note=DEMO_NOTE)

    def receipt(self) -> str:
        """The receipt as JSON."""
        rounded = {
            name: round(value, 1) if isinstance(value, float) else value
            for name, value in self._fields.items()
        }
        return Receipt.model_validate(rounded).model_dump_json(exclude_none=True)


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
        """Texts per prompt. Raises PermanentError (invalid_request) for a prompt too long."""
        self._engine.model(self._claim.model).check(item.prompts, item.params)
        answer = cast(Generated, self._ask(item))
        self._watch.add("generate_ms", answer.pass_ms)
        self._watch.add("tokens", sum(text.tokens for texts in answer.texts for text in texts))
        return answer

    def rank(self, item: RankItem) -> Ranked:
        """A log-likelihood per choice and prompt.

        Raises PermanentError (invalid_request) for a prompt too long.
        """
        self._engine.model(self._claim.model).check_choices(item.prompts, item.choices)
        answer = cast(Ranked, self._ask(item))
        self._watch.add("generate_ms", answer.pass_ms)
        return answer

    def match(self, item: MatchItem) -> Matched:
        """A score per text."""
        answer = cast(Matched, self._ask(item))
        self._watch.add("match_ms", answer.pass_ms)
        return answer

    def embed(self, item: EmbedItem) -> Embedded:
        """Features by name. Raises PermanentError (invalid_request) for a text too long."""
        if item.text is not None:
            self._engine.model(self._claim.model).check_text(item.text)
        answer = cast(Embedded, self._ask(item))
        self._watch.add("embed_ms", answer.pass_ms)
        return answer

    def _ask(self, item: Item) -> ItemAnswer:
        """Waits for an answer; a claim that is lost meanwhile gives its place in the batch up."""
        lost: threading.Event = self._held.event(self._claim)
        started = time.monotonic()
        future = self._engine.submit(self._claim.model, item, self._priority)
        self._held.on_lost(self._claim, future.cancel)
        try:
            answer = future.result(timeout=self._timeout_s)
        finally:
            future.cancel()
        if lost.is_set():
            raise Lost
        waited = (time.monotonic() - started) * 1000 - answer.pass_ms
        self._watch.add("wait_ms", max(0.0, waited))
        self._watch.say(batch_size=answer.batch_size)
        return answer
