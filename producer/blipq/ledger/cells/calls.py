"""Calls to cells, as generators yield them: clients with and without an event loop make them.

A generator yields ``Call``s. It is sent their answers, or thrown the BlipqError that one raised;
what it returns is the answer of the whole.
"""

from collections.abc import Callable, Generator
from operator import methodcaller
from typing import Any, Generic, NamedTuple, TypeVar

from blipq.errors import QueueUnavailable
from blipq.ledger.cells.health import Health

T = TypeVar("T")


class Call(NamedTuple):
    """What to call on the ledger of a cell."""

    cell: str
    on: Callable[[Any], Any]


def call(cell: str, method: str, /, *args: Any, **options: Any) -> Call:
    """A method of a cell's ledger with its arguments."""
    return Call(cell, methodcaller(method, *args, **options))


Calls = Generator[Call, Any, T]


class Round(Generic[T]):
    """The calls of one generator, one after the other; records the health of each cell."""

    def __init__(self, calls: Calls[T], health: Health) -> None:
        self._calls = calls
        self._health = health
        self._answer: list[T] = []
        self.call: Call | None = None
        self._step(calls.send, None)

    def answered(self, answer: Any) -> None:
        """The call was answered. Raises what the generator makes of it."""
        assert self.call is not None, "there was a call"
        self._health.answered(self.call.cell)
        self._step(self._calls.send, answer)

    def failed(self, error: Exception) -> None:
        """The call raised. Raises what the generator makes of it."""
        assert self.call is not None, "there was a call"
        if isinstance(error, QueueUnavailable):
            self._health.failed(self.call.cell, error)
        else:
            self._health.answered(self.call.cell)
        self._step(self._calls.throw, error)

    @property
    def answer(self) -> T:
        """What the generator returned, when there is no call left."""
        return self._answer[0]

    def _step(self, step: Callable[[Any], Call], given: Any) -> None:
        try:
            self.call = step(given)
        except StopIteration as stop:
            self.call = None
            self._answer.append(stop.value)
