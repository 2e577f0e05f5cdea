"""The seam: what callers see of an engine (``Inference``), and what it must offer (``Backend``).

Callers are the same whether the engine is in their process or in another one.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any, Protocol

from blipq_worker.seam.errors import EngineGone, ItemFailed
from blipq_worker.seam.requests import (
    Answer,
    Failure,
    Feature,
    Item,
    Load,
    ModelInfo,
    Outcome,
    Priority,
)

#: Stands for a submitted item; only its backend knows what it is. Not None.
Handle = object


class Inference(Protocol):
    """An engine, to its callers. Thread-safe; every wait has a timeout."""

    def submit(
        self, model: str, item: Item, priority: Priority, deadline: float | None = None
    ) -> "Future[Answer]":
        """Sends an item. Cancelling the Future ends the work on it, and so does the ``deadline``
        (monotonic), at which the Future is cancelled.

        The Future raises ItemFailed and EngineGone. Raises EngineBusy, EngineGone, UnknownModel,
        and ValueError where the pixels are not what the model takes.
        """

    def knows(
        self, model: str, digests: Sequence[str], features: Collection[Feature]
    ) -> tuple[bool, ...]:
        """For each image whether all these features of it are known now.

        Later some may be forgotten. Raises EngineGone, UnknownModel.
        """

    def models(self) -> Mapping[str, ModelInfo]:
        """The served models by name. Raises EngineGone."""

    def model(self, name: str) -> ModelInfo:
        """A served model. Raises EngineGone, UnknownModel."""

    def close(self) -> None:
        """Ends the use of the engine: what has no answer yet fails with EngineGone."""


class Backend(Protocol):
    """The models behind a seam.

    Behind an ``EngineServer`` all is called on the thread that polls; in one process with its
    callers ``submit``, ``cancel`` and ``knows`` are called on theirs.
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
    ) -> Handle:
        """Takes an item of a served model; must not wait.

        ``done`` is called exactly once, on any thread, at the deadline (monotonic) and after a
        ``cancel``, too: from then on the item's pixels are not read any more. Raises ItemFailed.
        """

    def cancel(self, handle: Handle) -> None:
        """Nobody waits for the item any more. Nothing happens where it is done."""

    def knows(
        self, model: str, digests: Sequence[str], features: Collection[Feature]
    ) -> Sequence[bool]:
        """For each image whether all these features of it are known."""

    def load(self) -> Load:
        """What there is to do."""


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
