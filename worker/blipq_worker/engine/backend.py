"""The resident models behind one batcher: the one place where jobs meet the GPU."""

import time
import traceback
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

from msgspec.structs import replace

from blipq.contract import ErrorCode
from blipq.errors import WorkError
from blipq.telemetry import names, tracing
from blipq.telemetry.trace import NOTHING, Trace, is_sampled
from blipq_worker.batching.batcher import Batcher
from blipq_worker.batching.entries import Ticket
from blipq_worker.batching.interface import BatcherClosed, Idle, Judge
from blipq_worker.blip2 import Adapted, Blip2, GenerateItem, Pixels
from blipq_worker.blip2 import Item as ModelItem
from blipq_worker.blip2.loading.compiling import since_compiling
from blipq_worker.engine.faults import is_out_of_memory
from blipq_worker.engine.verbs import GENERATE, Verb, as_model_item, verb_of
from blipq_worker.inference.interface import EngineGone, Handle, ItemFailed
from blipq_worker.inference.requests import (
    Answer,
    Failure,
    Feature,
    ImagePixels,
    Item,
    Load,
    ModelInfo,
    Origin,
    Outcome,
    Priority,
)

#: Characters of a traceback that a failure carries, from its end.
MOST_TRACE = 32_768

#: The setting of texts that need slots that grow. They have a session of their own: what they wait
#: for is not what others wait for, so neither keeps the others from joining.
_LONG = "long"

_URGENCY: Mapping[Priority, int] = {"high": 0, "normal": 1, "low": 2}

_FORGOTTEN = "the image came without pixels, and is not known any more"


class _Key(NamedTuple):
    """What items must share to run together. ``model`` comes first: see ``Trust``."""

    model: str
    verb: Verb
    setting: Hashable


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """An item on its way through the batcher.

    item: as the model takes it, with pixels of its own. image: as it was submitted, for ``Trust``.
    cost: see ``Verb``. trace: the span that waits for it, or "".
    """

    item: ModelItem
    image: ImagePixels | None
    cost: int
    trace: str = ""


class VisionTimes:
    """How long images have waited for the vision tower. Of the batcher's thread.

    Each task has its own ``Pixels``, with which its entry goes.
    """

    def __init__(self) -> None:
        self._ms: WeakKeyDictionary[Pixels, float] = WeakKeyDictionary()

    def add(self, images: Sequence[Pixels], ms: float) -> None:
        """Counts a pass that all of these images waited for."""
        for image in images:
            self._ms[image] = self._ms.get(image, 0.0) + ms

    def of(self, task: Task) -> float:
        """Milliseconds of a task's image; 0 where all was known, and without an image."""
        return 0.0 if task.item.pixels is None else self._ms.get(task.item.pixels, 0.0)


class Engine:
    """Served models by name, and the batcher whose thread alone runs them.

    An ``inference.interface.Backend``. max_waiting: items beyond which ``submit`` blocks; behind a
    socket at least the credits of all fronts, so that it never does. on_start: is called before a
    pass with the handles of items that newly take part in it. The rest: see ``Batcher``.
    """

    def __init__(
        self,
        models: Mapping[str, Blip2],
        *,
        max_batch_size: int,
        batch_wait_timeout_s: float,
        max_waiting: int,
        judge: Judge | None = None,
        idle: Idle | None = None,
        on_start: Callable[[Sequence[Handle]], None] = lambda handles: None,
    ) -> None:
        self._models = dict(models)
        #: Who runs the items of a model: the one that its adapter is over, or itself.
        self._residents = _residents(self._models)
        self._times = VisionTimes()
        #: What is known of images whose items share them, as long as there are such items: all of
        #: a job are encoded once, whatever the cache holds.
        self._features: WeakKeyDictionary[Origin, dict[str, Any]] = WeakKeyDictionary()
        self.batcher: Batcher[Task, Answer] = Batcher(
            self._run,
            max_batch_size=max_batch_size,
            batch_wait_timeout_s=batch_wait_timeout_s,
            max_waiting=max_waiting,
            sessions={
                _Key(name, GENERATE, setting): partial(Writing, model, self._times, setting)
                for name, model in self._models.items()
                if self._residents[name] == name
                for setting in (None, _LONG)
            },
            judge=judge,
            idle=idle,
            on_start=on_start,
            shared=partial(replace, shared=True),
        )
        for model in self._models.values():
            model.on_step(self.batcher.progress)
            model.on_encode(self._times.add)

    def models(self) -> Mapping[str, ModelInfo]:
        """The served models by name."""
        return {name: model.info for name, model in self._models.items()}

    def check(self, model: str, item: Item) -> None:
        """Raises ItemFailed where an item could not run, whatever its image."""
        try:
            self._models[model].check(as_model_item(item))
        except WorkError as error:
            raise ItemFailed(failure_of(error)) from error

    def submit(
        self,
        model: str,
        item: Item,
        priority: Priority,
        deadline: float | None,
        done: Callable[[Outcome], None],
        alone: bool = False,
        trace: str = "",
    ) -> Handle:
        """Takes an item. Raises ItemFailed (image_unknown), and EngineGone once it is closed."""
        verb = verb_of(item)
        pixels = None if item.image is None else self._pixels(model, item.image, verb.feature(item))
        served, made = self._models[model], as_model_item(item, pixels)
        if isinstance(served, Adapted):
            made = served.of(made)
        task = Task(made, item.image, verb.cost(item), trace)
        resident = self._residents[model]
        key = _Key(resident, verb, self._setting(resident, task, verb, item))
        try:
            future = self.batcher.submit(
                task,
                key,
                priority=_URGENCY[priority],
                deadline=deadline,
                alone=alone,
                same=_same(verb, item, made),
            )
        except BatcherClosed as error:
            raise EngineGone("the engine is closed") from error
        future.add_done_callback(partial(_settle, done))
        return future

    def _setting(self, model: str, task: Task, verb: Verb, item: Item) -> Hashable:
        """What an item shares with those that it runs with, beside model and verb."""
        if isinstance(task.item, GenerateItem) and self._models[model].is_long(task.item):
            return _LONG
        return verb.setting(item)

    def cancel(self, handle: Handle) -> None:
        """Nobody waits for the item any more. Nothing happens where it is done."""
        cast("Future[Answer]", handle).cancel()

    def knows(
        self, model: str, digests: Sequence[str], features: Collection[Feature]
    ) -> list[bool]:
        """For each image whether all these features of it are known."""
        recall = self._models[model].recall
        return [recall(digest, features) is not None for digest in digests]

    def forget(self, model: str, digests: Collection[str]) -> None:
        """Drops what is known of these images, but not what an item holds."""
        self._models[model].forget(digests)

    def load(self) -> Load:
        """What there is to do. A model that compiles makes progress."""
        stalled_s = min(self.batcher.stalled_for(), since_compiling())
        return Load(self.batcher.waiting, self.batcher.running, stalled_s)

    def _pixels(self, model: str, image: ImagePixels, feature: Feature) -> Pixels:
        """What the model is given of an image. Raises ItemFailed (image_unknown)."""
        served = self._models[model]
        features = self._features.setdefault(image.origin, {})
        if image.pixels:
            pixels = served.pixels(image.pixels, digest=image.digest, whole=image.whole)
        else:
            # What is held from now on cannot be forgotten before the pass.
            known = None if image.digest is None else served.recall(image.digest, [feature])
            if known is None:
                raise ItemFailed(Failure("image_unknown", ErrorCode.INTERNAL, _FORGOTTEN))
            features.update(known.features)
            pixels = known
        pixels.features = features
        return pixels

    def _run(
        self, key: Hashable, items: Sequence[Task], wanted: Callable[[int], bool]
    ) -> Sequence[Answer]:
        """One pass of a model; on the batcher's thread."""
        assert isinstance(key, _Key)
        run = getattr(self._models[key.model], key.verb.name)
        given = [task.item for task in items]
        started = time.monotonic()
        with _passing(key, items) as span:
            raw: Sequence[Any] = run(given, wanted) if key.verb is GENERATE else run(given)
        took = (time.monotonic() - started) * 1000
        of_one = took / sum(task.cost for task in items)
        return [
            Answer(
                value=key.verb.value(each),
                pass_ms=took,
                vision_ms=self._times.of(task),
                batch_size=len(items),
                device_ms=of_one * task.cost,
                span=span.context,
            )
            for task, each in zip(items, raw, strict=True)
        ]


def _passing(key: _Key, tasks: Sequence[Task]) -> Trace:
    """The span of a batch's pass, below the first of those that wait for it, with links to all.

    Only of jobs that are sampled: where none is, there is no span.
    """
    waiting = [task.trace for task in tasks if task.trace and is_sampled(task.trace)]
    if not waiting:
        return NOTHING
    attributes = {names.MODEL_NAME: key.model, names.BATCH_SIZE: len(tasks)}
    name = f"{names.PASS} {key.verb.name}"
    return tracing.continued(name, waiting[0], attributes=attributes, links=waiting)


def _writing(task: Task) -> Trace:
    """The span of a text that is written among others, from when it joins to when it leaves."""
    name = f"{names.PASS} {GENERATE.name}"
    return tracing.continued(name, task.trace, links=[task.trace]) if task.trace else NOTHING


def _residents(models: Mapping[str, Blip2]) -> dict[str, str]:
    """The name of the resident model behind each name."""
    names = {id(model): name for name, model in models.items()}
    return {
        name: names[id(model.resident)] if isinstance(model, Adapted) else name
        for name, model in models.items()
    }


def _same(verb: Verb, item: Item, made: ModelItem) -> Hashable | None:
    """What items share that must come to the same; None for one that is like no other."""
    image = item.image
    if not verb.repeats(item) or (image is not None and image.digest is None):
        return None
    rest = tuple(getattr(item, name) for name in item.__struct_fields__ if name != "image")
    adapter = getattr(made, "adapter", 0)
    return None if image is None else image.digest, rest, adapter


def failure_of(error: BaseException) -> Failure:
    """Why an item failed, as its front receives it."""
    if isinstance(error, WorkError):
        kind: Any = "transient" if error.retryable else "permanent"
        return Failure(kind, error.code, str(error))
    if is_out_of_memory(error):
        message = "the model ran out of memory on this job alone"
        return Failure("permanent", ErrorCode.OUT_OF_MEMORY, message)
    trace = "".join(traceback.format_exception(error))[-MOST_TRACE:]
    return Failure("internal", ErrorCode.INTERNAL, f"{type(error).__name__}: {error}", trace)


def _settle(done: Callable[[Outcome], None], future: "Future[Answer]") -> None:
    if future.cancelled():
        done(Failure("cancelled", ErrorCode.INTERNAL, "nobody waits for it"))
    elif (error := future.exception()) is not None:
        done(failure_of(error))
    else:
        done(future.result())


@dataclass(slots=True)
class _Joined:
    """A task in a session: since when, and the most tasks that ran together with it.

    before: what the session's clock (``Writing``) showed. span: of its stay. begun: when it had its
    first token, to a step.
    """

    task: Task
    since: float
    before: float
    span: Trace
    neighbours: int = 0
    begun: float | None = None


class Writing:
    """A session of a model (a ``batching.interface.Session``), with what its answers took.

    setting: of its items.
    """

    def __init__(self, model: Blip2, times: VisionTimes, setting: Hashable = None) -> None:
        #: Tasks of the fullest step so far that all of these were in.
        self._most = 0
        self._session = model.long_session() if setting is _LONG else model.session()
        self._times = times
        self._tasks: dict[Ticket, _Joined] = {}
        #: Those of them that have no token yet.
        self._silent: set[Ticket] = set()
        #: The rows of all these, and a clock of what one of them has cost so far: each step adds
        #: its milliseconds divided by the rows, so that nothing is counted task by task.
        self._rows = 0
        self._row_ms = 0.0
        self.has_room = self._session.has_room

    def join(self, ticket: Ticket, task: Task) -> None:
        """Takes a task in."""
        assert isinstance(task.item, GenerateItem)
        self._session.join(ticket, task.item)
        span = _writing(task)
        self._tasks[ticket] = _Joined(task, time.monotonic(), self._row_ms, span)
        self._silent.add(ticket)
        self._rows += task.cost
        self._most = 0

    def leave(self, ticket: Ticket) -> None:
        """Lets a task go."""
        self._session.leave(ticket)
        joined = self._tasks.pop(ticket)
        self._silent.discard(ticket)
        joined.span.end()
        self._rows -= joined.task.cost

    def step(self, tickets: Sequence[Ticket]) -> list[tuple[Ticket, Answer]]:
        """One step."""
        if len(tickets) > self._most:  # not at every step: it has a task's cost
            self._most = len(tickets)
            for ticket in tickets:
                joined = self._tasks[ticket]
                joined.neighbours = max(joined.neighbours, len(tickets))
        started = time.monotonic()
        done = self._session.step(tickets)
        now = time.monotonic()
        self._row_ms += (now - started) * 1000 / self._rows
        answers = [(ticket, self._answer(ticket, texts, now)) for ticket, texts in done]
        for ticket in [each for each in self._silent if self._session.has_begun(each)]:
            self._tasks[ticket].begun = now
            self._silent.remove(ticket)
        return answers

    def _answer(self, ticket: Ticket, texts: Any, now: float) -> Answer:
        joined = self._tasks.pop(ticket)
        self._silent.discard(ticket)
        self._rows -= joined.task.cost
        took = (now - joined.since) * 1000
        begun = now if joined.begun is None else joined.begun
        joined.span.set_attributes({names.BATCH_SIZE: joined.neighbours})
        joined.span.end()
        return Answer(
            value=GENERATE.value(texts),
            pass_ms=took,
            vision_ms=self._times.of(joined.task),
            batch_size=joined.neighbours,
            device_ms=(self._row_ms - joined.before) * joined.task.cost,
            span=joined.span.context,
            first_token_ms=(begun - joined.since) * 1000,
        )
