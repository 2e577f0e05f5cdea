"""What callers see of an engine (``Inference``), and what an engine must offer (``Backend``).

Callers are the same whether the engine is in their process or in another one. An item comes to
nothing by one of these:

    InferenceError
    ├── EngineGone      the connection ended before the answer: the item may not have been to blame
    ├── EngineBusy      all credits were in use for the whole timeout: nothing was sent
    ├── UnknownModel    the engine does not serve it (LookupError): nothing was sent
    └── ItemFailed      the engine's verdict on this item; has .failure
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any, Protocol

from blipq_worker.inference.requests import (
    Answer,
    Failure,
    Feature,
    Item,
    Load,
    ModelInfo,
    Outcome,
    Priority,
)

#: Of pixels at once: some 3,500 images of 224 x 224.
MOST_BYTES = 512 * 2**20
#: Stands for a submitted item; only its backend knows what it is. Not None; can be hashed.
Handle = object


class InferenceError(Exception):
    """Base of what an ``Inference`` raises."""


class EngineGone(InferenceError):
    """The connection to the engine ended, or there is none. The item need not be the cause.

    started: the engine died, or fell silent, after the item's pass had begun: the item is one of
    those that may have caused it. False where the engine ended the connection itself.
    """

    def __init__(self, message: str, *, started: bool = False) -> None:
        super().__init__(message)
        self.started = started


class EngineBusy(InferenceError):
    """The engine had no credit left for this front within the timeout."""


class UnknownModel(InferenceError, LookupError):
    """The engine does not serve this model."""


class ItemFailed(InferenceError):
    """The engine ran the item and failed, or refused it; the error has the reason."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(f"{failure.code}: {failure.message}")
        self.failure = failure


class Inference(Protocol):
    """An engine, to its callers. Thread-safe; every wait has a timeout."""

    def submit(
        self,
        model: str,
        item: Item,
        priority: Priority,
        deadline: float | None = None,
        alone: bool = False,
        trace: str = "",
    ) -> "Future[Answer]":
        """Sends an item. Cancelling the Future ends the work on it, and so does the ``deadline``
        (monotonic), at which the Future is cancelled. alone: it runs while nothing else does.
        trace: the span (W3C ``traceparent``) that waits for it, or "".

        The Future raises ItemFailed and EngineGone. Raises EngineBusy, EngineGone, UnknownModel,
        and ValueError where the pixels are not what the model takes.
        """

    def knows(
        self, model: str, digests: Sequence[str], features: Collection[Feature]
    ) -> tuple[bool, ...]:
        """For each image whether all these features of it are known now.

        Later some may be forgotten. Raises EngineGone, UnknownModel.
        """

    def forget(self, digests: Collection[str]) -> None:
        """Has all models drop what is known of these images; waits for no answer.

        What an item holds that runs is not dropped. Raises EngineGone.
        """

    def check(self, model: str, item: Item) -> None:
        """Raises ItemFailed where an item could not run, whatever its image: a text is too long, or
        the model has no checkpoint for it.

        For the caller's own thread, so that such an item spoils no batch. Raises EngineGone,
        UnknownModel.
        """

    def models(self) -> Mapping[str, ModelInfo]:
        """The served models by name. Raises EngineGone."""

    def model(self, name: str) -> ModelInfo:
        """A served model. Raises EngineGone, UnknownModel."""

    def close(self) -> None:
        """Ends the use of the engine: what has no answer yet fails with EngineGone."""


class Backend(Protocol):
    """The models behind an interface.

    Behind an ``EngineServer`` all is called on the thread that polls; in one process with its
    callers all is called on theirs.
    """

    def models(self) -> Mapping[str, ModelInfo]:
        """The served models by name; the same for the backend's whole life."""

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
        """Takes an item of a served model; must not wait.

        ``done`` is called exactly once, on any thread, at the deadline (monotonic) and after a
        ``cancel``, too: from then on the item's pixels are not read any more. alone: nothing else
        may run beside it. trace: the span that waits for it, or "". Raises ItemFailed.
        """

    def cancel(self, handle: Handle) -> None:
        """Nobody waits for the item any more. Nothing happens where it is done."""

    def knows(
        self, model: str, digests: Sequence[str], features: Collection[Feature]
    ) -> Sequence[bool]:
        """For each image whether all these features of it are known."""

    def forget(self, model: str, digests: Collection[str]) -> None:
        """Drops what is known of these images, but not what an item holds; must not wait."""

    def load(self) -> Load:
        """What there is to do."""


class CheckingBackend(Backend, Protocol):
    """A backend in one process with its callers: it counts the tokens of their texts."""

    def check(self, model: str, item: Item) -> None:
        """Raises ItemFailed where an item could not run, whatever its image."""


class Rows(Protocol):
    """Memory for pixels, lent image by image. Of one thread; a bound is its duty."""

    def lend(self, size: int) -> memoryview | None:
        """Room for exactly so many bytes; None if there is none now."""

    def take_back(self, row: memoryview) -> None:
        """The room is free again."""


class HeapRows:
    """Each image in memory of its own, ``most_bytes`` at once.

    Nothing is used again: whoever reads an image too long reads that image and no other one.
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._left = most_bytes

    def lend(self, size: int) -> memoryview | None:
        """Room for exactly so many bytes; None if there is none now."""
        if size > self._left:
            return None
        self._left -= size
        return memoryview(bytearray(size))

    def take_back(self, row: memoryview) -> None:
        """The room is free again."""
        self._left += row.nbytes


def settle(future: "Future[Any]", outcome: "Outcome | EngineGone") -> None:
    """Sets a Future unless its waiter has given up on it."""
    with suppress(InvalidStateError):
        match outcome:
            case Answer():
                future.set_result(outcome)
            case Failure(kind="cancelled"):
                future.cancel()
            case Failure():
                future.set_exception(ItemFailed(outcome))
            case EngineGone():
                future.set_exception(outcome)
