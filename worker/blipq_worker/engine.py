"""The resident models behind one batcher: the one place where jobs of a process meet the GPU."""

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from blipq.contract import ErrorCode, Priority
from blipq.errors import PermanentError
from blipq_worker.batcher import Batcher
from blipq_worker.blip2 import (
    Arrays,
    Blip2,
    EmbedItem,
    GeneratedText,
    GenerateItem,
    Item,
    MatchItem,
    RankItem,
    RerankItem,
)

_URGENCY = {Priority.HIGH: 0, Priority.NORMAL: 1, Priority.LOW: 2}


@dataclass(frozen=True, slots=True)
class Generated:
    """Texts per prompt (several where several were asked for), and what they took."""

    texts: list[list[GeneratedText]]
    pass_ms: float
    batch_size: int


@dataclass(frozen=True, slots=True)
class Ranked:
    """A log-likelihood per choice, per prompt, and what they took."""

    likelihoods: list[list[float]]
    pass_ms: float
    batch_size: int


@dataclass(frozen=True, slots=True)
class Matched:
    """A score per text, and what they took."""

    scores: list[float]
    pass_ms: float
    batch_size: int


@dataclass(frozen=True, slots=True)
class Reranked:
    """The matching logit and the probability of a match, and what they took."""

    scores: tuple[float, float]
    pass_ms: float
    batch_size: int


@dataclass(frozen=True, slots=True)
class Embedded:
    """Features by name, and what they took."""

    arrays: Arrays
    pass_ms: float
    batch_size: int


ItemAnswer = Generated | Ranked | Matched | Reranked | Embedded

#: The model's method that runs items of a type, and what its answers become.
_VERBS: Mapping[type, tuple[str, Callable[..., ItemAnswer]]] = {
    GenerateItem: ("generate", Generated),
    RankItem: ("rank", Ranked),
    MatchItem: ("match", Matched),
    RerankItem: ("rerank", Reranked),
    EmbedItem: ("embed", Embedded),
}


class Engine:
    """Served models by name, and the batcher whose thread alone runs them."""

    def __init__(
        self,
        models: Mapping[str, Blip2],
        *,
        max_batch_size: int,
        batch_wait_timeout_s: float,
        max_waiting: int,
    ) -> None:
        self.models = dict(models)
        self.batcher: Batcher[Item, ItemAnswer] = Batcher(
            self._run,
            max_batch_size=max_batch_size,
            batch_wait_timeout_s=batch_wait_timeout_s,
            max_waiting=max_waiting,
        )
        for model in self.models.values():
            model.on_step(self.batcher.progress)

    def model(self, name: str) -> Blip2:
        """A served model; PermanentError (model_unavailable) if it is not served here."""
        model = self.models.get(name)
        if model is None:
            message = f"this worker does not serve the model {name!r}"
            raise PermanentError(ErrorCode.MODEL_UNAVAILABLE, message)
        return model

    def submit(self, name: str, item: Item, priority: Priority) -> "Future[ItemAnswer]":
        """Sends an item to its model's next batch."""
        return self.batcher.submit(item, _batch_key(name, item), priority=_URGENCY[priority])

    def _run(self, key: Hashable, items: Sequence[Item]) -> Sequence[ItemAnswer]:
        """One pass of a model; on the batcher's thread."""
        model = self.models[key[0]]  # type: ignore[index]
        verb, answer = _VERBS[type(items[0])]
        started = time.monotonic()
        answers = getattr(model, verb)(items)
        took = (time.monotonic() - started) * 1000
        return [answer(each, took, len(items)) for each in answers]


def _batch_key(name: str, item: Item) -> Hashable:
    """What items must share to run together: the model, and what is one setting for all rows."""
    verb, _ = _VERBS[type(item)]
    match item:
        case GenerateItem():
            return name, verb, item.params
        case MatchItem():
            return name, verb, item.head
        case RankItem() | RerankItem() | EmbedItem():
            return name, verb
