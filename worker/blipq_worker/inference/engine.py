"""The resident models behind one batcher: the one place where jobs of a process meet the GPU."""

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

from blipq.contract import ErrorCode, Priority
from blipq.errors import PermanentError
from blipq_worker.batching.batcher import Batcher, Judge, Ticket
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
        max_beams: int = 80,
        judge: Judge | None = None,
    ) -> None:
        self.models = dict(models)
        self.batcher: Batcher[Item, ItemAnswer] = Batcher(
            self._run,
            max_batch_size=max_batch_size,
            batch_wait_timeout_s=batch_wait_timeout_s,
            max_waiting=max_waiting,
            sessions={
                _in_flight(name): partial(_Writing, model) for name, model in self.models.items()
            },
            cost=_beams,
            max_batch_cost=max_beams,
            judge=judge,
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

    def submit(
        self, name: str, item: Item, priority: Priority, deadline: float | None = None
    ) -> "Future[ItemAnswer]":
        """Sends an item to its model. Cancelling the Future ends the work on it, and so does the
        ``deadline`` (monotonic).
        """
        key = _batch_key(name, item)
        return self.batcher.submit(item, key, priority=_URGENCY[priority], deadline=deadline)

    def _run(
        self, key: Hashable, items: Sequence[Item], wanted: Callable[[int], bool]
    ) -> Sequence[ItemAnswer]:
        """One pass of a model; on the batcher's thread."""
        model = self.models[key[0]]  # type: ignore[index]
        verb, answer = _VERBS[type(items[0])]
        started = time.monotonic()
        if isinstance(items[0], GenerateItem):
            answers: Any = model.generate(items, wanted)  # type: ignore[arg-type]
        else:
            answers = getattr(model, verb)(items)
        took = (time.monotonic() - started) * 1000
        return [answer(each, took, len(items)) for each in answers]


class _Writing:
    """A session of a model (a ``batching.batcher.Session``), with what its answers took."""

    def __init__(self, model: Blip2) -> None:
        self._session = model.session()
        self._joined: dict[Ticket, float] = {}
        self._company: dict[Ticket, int] = {}
        self.has_room = self._session.has_room

    def join(self, ticket: Ticket, item: Item) -> None:
        """Takes an item in."""
        self._session.join(ticket, item)  # type: ignore[arg-type]
        self._joined[ticket] = time.monotonic()
        self._company[ticket] = 0

    def leave(self, ticket: Ticket) -> None:
        """Lets an item go."""
        self._session.leave(ticket)
        del self._joined[ticket], self._company[ticket]

    def step(self, tickets: Sequence[Ticket]) -> list[tuple[Ticket, ItemAnswer]]:
        """One step; the batch size of an item is the most company that it had."""
        for ticket in tickets:
            self._company[ticket] = max(self._company[ticket], len(tickets))
        said = self._session.step(tickets)
        return [(ticket, self._answer(ticket, texts)) for ticket, texts in said]

    def _answer(self, ticket: Ticket, texts: list[list[GeneratedText]]) -> Generated:
        took = (time.monotonic() - self._joined.pop(ticket)) * 1000
        return Generated(texts, took, self._company.pop(ticket))


def _in_flight(name: str) -> Hashable:
    """The key of a model's session."""
    return name, "write"


def _batch_key(name: str, item: Item) -> Hashable:
    """What items must share to run together: the model, and what is one setting for all rows."""
    verb, _ = _VERBS[type(item)]
    match item:
        case GenerateItem() if item.params.in_flight:
            return _in_flight(name)
        case GenerateItem():
            return name, verb, item.params
        case MatchItem():
            return name, verb, item.head
        case RankItem() | RerankItem() | EmbedItem():
            return name, verb


def _beams(item: Item) -> int:
    """What an item takes of a batch's room for beams."""
    return len(item.prompts) * item.params.num_beams if isinstance(item, GenerateItem) else 1
