"""A front's way to its engine: submits items over a socket, and finds the engine again."""

import itertools
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path

from blipq_worker.inference.address import check_path
from blipq_worker.inference.bounds import require_sendable
from blipq_worker.inference.connection import Connection
from blipq_worker.inference.interface import EngineGone, UnknownModel
from blipq_worker.inference.protocol import (
    MOST_DIGESTS,
    Beat,
    Forget,
    Hello,
    Knows,
    Submit,
    checked,
)
from blipq_worker.inference.requests import (
    Answer,
    Feature,
    Item,
    ModelInfo,
    Priority,
    check_pixels,
)

log = logging.getLogger(__name__)

#: Between two tries to connect.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0


class EngineClient:
    """An ``Inference`` over the socket of an engine in another process.

    name: of this front in the engine's log. silence_s: so long without a beat means that the
    engine is frozen; then, and where the connection ends, all that has no answer fails with
    EngineGone, ``on_lost`` gets the reason on the thread that reads, which connects again until
    ``close``. timeout_s: longest wait for a connection, a credit, or an answer to a question.
    check: raises ItemFailed for an item that a model could not run, without asking the engine.

    A Future's callbacks run on the thread that reads: they must not wait. Raises AddressError for a
    path that no socket can have, and ValueError for a name with more than letters and digits.
    """

    def __init__(
        self,
        path: Path,
        *,
        name: str = "front",
        silence_s: float = 10.0,
        timeout_s: float = 30.0,
        on_lost: Callable[[str], None] = lambda reason: None,
        check: Callable[[ModelInfo, Item], None] = lambda model, item: None,
    ) -> None:
        check_path(path)
        checked(Hello(os.getpid(), name), 0)
        self._path, self._name = path, name
        self._silence_s, self._timeout_s = silence_s, timeout_s
        self._on_lost, self._check = on_lost, check
        self._ids = itertools.count(1)  # never used again, on whatever connection
        # Signals a new connection, and the end of the client, to those who wait for one.
        self._changed = threading.Condition()
        self._connection: Connection | None = None
        self._why = f"no engine at {path} yet"
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="blipq-engine-client", daemon=True)
        self._thread.start()

    @property
    def connected(self) -> bool:
        """Whether an engine is there."""
        return self._connection is not None

    @property
    def problem(self) -> str | None:
        """Why no engine is there; None where one is."""
        return None if self.connected else self._why

    @property
    def beat(self) -> Beat | None:
        """The engine's last beat; None without an engine."""
        connection = self._connection
        return None if connection is None else connection.beat

    def submit(
        self,
        model: str,
        item: Item,
        priority: Priority,
        deadline: float | None = None,
        alone: bool = False,
        trace: str = "",
    ) -> "Future[Answer]":
        """See ``Inference.submit``. Waits for a connection and a credit."""
        connection = self._connected()
        check_pixels(item, _model(connection, model))
        id = next(self._ids)
        pixels, size = ((), 0) if item.image is None else (item.image.pixels, item.image.size)

        def encoded() -> bytes:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            return checked(Submit(model, priority, left, item, alone, trace), id, size)

        future = connection.submit(id, encoded, pixels, self._timeout_s)
        future.add_done_callback(partial(_cancelled, connection, id))
        return future

    def knows(
        self, model: str, digests: Sequence[str], features: Collection[Feature]
    ) -> tuple[bool, ...]:
        """See ``Inference.knows``."""
        connection = self._connected()
        _model(connection, model)
        id = next(self._ids)
        question = Knows(model, tuple(digests), tuple(features))
        future: Future[tuple[bool, ...]] = connection.request(id, checked(question, id))
        try:
            return future.result(self._timeout_s)
        except TimeoutError as error:
            raise EngineGone(f"the engine did not answer for {self._timeout_s:g} s") from error

    def forget(self, digests: Collection[str]) -> None:
        """See ``Inference.forget``. Waits for a connection."""
        connection, names = self._connected(), tuple(digests)
        for start in range(0, len(names), MOST_DIGESTS):
            connection.notify(checked(Forget(names[start : start + MOST_DIGESTS]), 0))

    def check(self, model: str, item: Item) -> None:
        """See ``Inference.check``."""
        info = self.model(model)
        require_sendable(model, item)
        self._check(info, item)

    def models(self) -> Mapping[str, ModelInfo]:
        """See ``Inference.models``."""
        return self._connected().welcome.models

    def model(self, name: str) -> ModelInfo:
        """See ``Inference.model``."""
        return _model(self._connected(), name)

    def close(self) -> None:
        """Ends the connection: what has no answer yet fails with EngineGone."""
        self._closed.set()  # first: the thread that reads must not connect again
        with self._changed:
            connection = self._connection
            self._changed.notify_all()
        if connection is not None:
            connection.end("this front closes its connection")
        if threading.current_thread() is not self._thread:  # a callback may close it, too
            self._thread.join(self._silence_s)

    def _connected(self) -> Connection:
        with self._changed:
            self._changed.wait_for(
                lambda: self._connection is not None or self._closed.is_set(), self._timeout_s
            )
            if self._closed.is_set():
                raise EngineGone("this front has closed its connection")
            if self._connection is None:
                raise EngineGone(self._why)
            return self._connection

    # -- the thread that reads --

    def _run(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while not self._closed.is_set():
            try:
                connection = Connection(self._path, self._name, self._silence_s)
            except EngineGone as error:
                self._why = str(error)
                self._closed.wait(pause_s * random.uniform(0.5, 1.0))
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            else:
                pause_s = _FIRST_PAUSE_S
                self._serve(connection)

    def _serve(self, connection: Connection) -> None:
        with self._changed:
            self._connection = connection
            self._changed.notify_all()
        if self._closed.is_set():  # closed before it could see this connection
            connection.end("this front closes its connection")
        try:
            self._why = connection.serve()
        except Exception:
            log.exception("reading from the engine failed")
            self._why = "reading from the engine failed"
        with self._changed:
            self._connection = None
        connection.close()
        if self._closed.is_set():
            return
        log.warning("the engine is gone: %s", self._why)
        try:
            self._on_lost(self._why)
        except Exception:
            log.exception("telling of the engine's end failed")


def _model(connection: Connection, name: str) -> ModelInfo:
    try:
        return connection.welcome.models[name]
    except KeyError as error:
        raise UnknownModel(f"the engine does not serve the model {name!r}") from error


def _cancelled(connection: Connection, id: int, future: "Future[Answer]") -> None:
    if future.cancelled():
        connection.cancel(id)
