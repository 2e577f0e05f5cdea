"""The resident models behind one batcher: the one place where jobs of a process meet the GPU."""

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from blipq.contract import ErrorCode, Priority
from blipq.errors import PermanentError
from blipq_worker.batching.batcher import Batcher, Judge, Ticket
from blipq_worker.blip2 import Blip2, GenerateItem, Item, Pixels
from blipq_worker.engine.verbs import GENERATE, VERBS, Verb
from blipq_worker.seam.requests import Answer

_URGENCY = {Priority.HIGH: 0, Priority.NORMAL: 1, Priority.LOW: 2}


class _Key(NamedTuple):
    """What items must share to run together. ``model`` comes first: see ``Trust``."""

    model: str
    verb: Verb
    setting: Hashable


class VisionTimes:
    """How long images have waited for the vision tower. Of the batcher's thread.

    Each item has its own ``Pixels``, with which its entry goes.
    """

    def __init__(self) -> None:
        self._ms: WeakKeyDictionary[Pixels, float] = WeakKeyDictionary()

    def add(self, images: Sequence[Pixels], ms: float) -> None:
        """Counts a pass that all of these images waited for."""
        for image in images:
            self._ms[image] = self._ms.get(image, 0.0) + ms

    def taken(self, image: Pixels | None) -> float:
        """Milliseconds of an image; 0 where all was known, and without an image."""
        return 0.0 if image is None else self._ms.pop(image, 0.0)


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
        self._times = VisionTimes()
        self.batcher: Batcher[Item, Answer] = Batcher(
            self._run,
            max_batch_size=max_batch_size,
            batch_wait_timeout_s=batch_wait_timeout_s,
            max_waiting=max_waiting,
            sessions={
                _Key(name, GENERATE, None): partial(Writing, model, self._times)
                for name, model in self.models.items()
            },
            cost=lambda item: VERBS[type(item)].cost(item),
            max_batch_cost=max_beams,
            judge=judge,
        )
        for model in self.models.values():
            model.on_step(self.batcher.progress)
            model.on_look(self._times.add)

    def model(self, name: str) -> Blip2:
        """A served model; PermanentError (model_unavailable) if it is not served here."""
        model = self.models.get(name)
        if model is None:
            message = f"this worker does not serve the model {name!r}"
            raise PermanentError(ErrorCode.MODEL_UNAVAILABLE, message)
        return model

    def submit(
        self, name: str, item: Item, priority: Priority, deadline: float | None = None
    ) -> "Future[Answer]":
        """Sends an item to its model. Cancelling the Future ends the work on it, and so does the
        ``deadline`` (monotonic).
        """
        verb = VERBS[type(item)]
        key = _Key(name, verb, verb.setting(item))
        return self.batcher.submit(item, key, priority=_URGENCY[priority], deadline=deadline)

    def _run(
        self, key: Hashable, items: Sequence[Item], wanted: Callable[[int], bool]
    ) -> Sequence[Answer]:
        """One pass of a model; on the batcher's thread."""
        assert isinstance(key, _Key)
        run = getattr(self.models[key.model], key.verb.name)
        started = time.monotonic()
        raw: Sequence[Any] = run(items, wanted) if key.verb is GENERATE else run(items)
        took = (time.monotonic() - started) * 1000
        return [
            Answer(key.verb.value(each), took, self._times.taken(item.pixels), len(items))
            for item, each in zip(items, raw, strict=True)
        ]


class Writing:
    """A session of a model (a ``batching.batcher.Session``), with what its answers took."""

    def __init__(self, model: Blip2, times: VisionTimes) -> None:
        self._session = model.session()
        self._times = times
        self._items: dict[Ticket, GenerateItem] = {}
        self._joined: dict[Ticket, float] = {}
        self._neighbours: dict[Ticket, int] = {}
        self.has_room = self._session.has_room

    def join(self, ticket: Ticket, item: Item) -> None:
        """Takes an item in."""
        assert isinstance(item, GenerateItem)
        self._session.join(ticket, item)
        self._items[ticket] = item
        self._joined[ticket] = time.monotonic()
        self._neighbours[ticket] = 0

    def leave(self, ticket: Ticket) -> None:
        """Lets an item go."""
        self._session.leave(ticket)
        del self._items[ticket], self._joined[ticket], self._neighbours[ticket]

    def step(self, tickets: Sequence[Ticket]) -> list[tuple[Ticket, Answer]]:
        """One step; an answer's batch size is the most items that ran together with its own."""
        for ticket in tickets:
            self._neighbours[ticket] = max(self._neighbours[ticket], len(tickets))
        done = self._session.step(tickets)
        return [(ticket, self._answer(ticket, texts)) for ticket, texts in done]

    def _answer(self, ticket: Ticket, texts: Any) -> Answer:
        took = (time.monotonic() - self._joined.pop(ticket)) * 1000
        vision_ms = self._times.taken(self._items.pop(ticket).pixels)
        return Answer(GENERATE.value(texts), took, vision_ms, self._neighbours.pop(ticket))
