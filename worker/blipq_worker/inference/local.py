"""The interface in one process: callers and engine without a socket between them."""

import threading
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from functools import partial

from blipq_worker.inference.bounds import require_sendable
from blipq_worker.inference.interface import (
    CheckingBackend,
    EngineGone,
    Handle,
    ItemFailed,
    UnknownModel,
    settle,
)
from blipq_worker.inference.protocol import Submit, checked
from blipq_worker.inference.requests import (
    Answer,
    Feature,
    Item,
    ModelInfo,
    Outcome,
    Priority,
    check_pixels,
)


class LocalInference:
    """An ``Inference`` over a backend in this process, whose methods must be thread-safe."""

    def __init__(self, backend: CheckingBackend) -> None:
        self._backend = backend
        self._models = dict(backend.models())
        # Under it: whether it is closed, so that no item enters behind the end of all the others.
        self._lock = threading.Lock()
        self._open: set[Future[Answer]] = set()
        self._closed = False

    def submit(
        self,
        model: str,
        item: Item,
        priority: Priority,
        deadline: float | None = None,
        alone: bool = False,
        trace: str = "",
    ) -> "Future[Answer]":
        """See ``Inference.submit``. Waits for nothing."""
        check_pixels(item, self.model(model))
        checked(Submit(model, priority, None, item, alone, trace), 0)
        future: Future[Answer] = Future()
        with self._lock:
            if self._closed:
                raise EngineGone("the engine is closed")
            self._open.add(future)
        try:
            handle = self._backend.submit(
                model, item, priority, deadline, partial(self._done, future), alone, trace
            )
        except ItemFailed as error:
            self._done(future, error.failure)
        except BaseException:
            self._forget(future)
            raise
        else:
            future.add_done_callback(partial(self._cancelled, handle))
        return future

    def knows(
        self, model: str, digests: Sequence[str], features: Collection[Feature]
    ) -> tuple[bool, ...]:
        """See ``Inference.knows``."""
        self.model(model)
        return tuple(self._backend.knows(model, digests, features))

    def forget(self, digests: Collection[str]) -> None:
        """See ``Inference.forget``."""
        for model in self._models:
            self._backend.forget(model, digests)

    def check(self, model: str, item: Item) -> None:
        """See ``Inference.check``. Also of what no message could carry."""
        self.model(model)
        require_sendable(model, item)
        self._backend.check(model, item)

    def models(self) -> Mapping[str, ModelInfo]:
        """See ``Inference.models``."""
        return self._models

    def model(self, name: str) -> ModelInfo:
        """See ``Inference.model``."""
        try:
            return self._models[name]
        except KeyError as error:
            raise UnknownModel(f"the engine does not serve the model {name!r}") from error

    def close(self) -> None:
        """Takes no more: what has no answer yet fails with EngineGone, and is given up."""
        with self._lock:
            self._closed = True
            futures, self._open = self._open, set()
        for future in futures:
            settle(future, EngineGone("the engine is closed"))

    def _done(self, future: "Future[Answer]", outcome: Outcome) -> None:
        """An item is done. Called by the backend, on any thread."""
        self._forget(future)
        settle(future, outcome)

    def _forget(self, future: "Future[Answer]") -> None:
        with self._lock:
            self._open.discard(future)

    def _cancelled(self, handle: Handle, future: "Future[Answer]") -> None:
        if future.cancelled() or isinstance(future.exception(), EngineGone):
            self._backend.cancel(handle)
