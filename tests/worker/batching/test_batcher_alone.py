"""An item that must run alone: nothing runs beside it, and everything else goes on after it."""

import random
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import pytest

from blipq_worker.batching.batcher import Batcher
from conftest import wait_until

SLOTS = 3


class Log:
    """What ran together, in order: ``(key, items)`` for each batch and each step.

    An item ``(name, steps)`` of a session takes so many steps.
    """

    def __init__(self) -> None:
        self.ran: list[tuple[Hashable, list[Any]]] = []
        self.held = threading.Event()
        self.held.set()

    def __call__(
        self, key: Hashable, items: Sequence[Any], wanted: Callable[[int], bool]
    ) -> Sequence[Any]:
        self.ran.append((key, [name for name, _ in items]))
        assert self.held.wait(20)
        return [name for name, _ in items]

    def together(self, name: str) -> set[str]:
        """With whom an item ran."""
        return {each for _, names in self.ran if name in names for each in names} - {name}

    def span(self, name: str) -> list[tuple[Hashable, list[Any]]]:
        """All that ran between an item's first and its last step."""
        at = [index for index, (_, names) in enumerate(self.ran) if name in names]
        return self.ran[at[0] : at[-1] + 1]


class Session:
    def __init__(self, log: Log, key: str) -> None:
        self._log, self._key = log, key
        self._left: dict[Any, list[Any]] = {}

    def has_room(self, ticket: Any) -> bool:
        return len(self._left) < SLOTS

    def join(self, ticket: Any, item: Any) -> None:
        self._left[ticket] = [*item]

    def leave(self, ticket: Any) -> None:
        del self._left[ticket]

    def step(self, tickets: Sequence[Any]) -> list[tuple[Any, Any]]:
        self._log.ran.append((self._key, [self._left[ticket][0] for ticket in tickets]))
        assert self._log.held.wait(20)
        time.sleep(0.0005)
        done = []
        for ticket in tickets:
            self._left[ticket][1] -= 1
            if self._left[ticket][1] == 0:
                done.append((ticket, self._left.pop(ticket)[0]))
        return done


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def batcher(log: Log) -> Iterator[Batcher[Any, Any]]:
    sessions = {key: (lambda key=key: Session(log, key)) for key in ("one", "two")}
    batcher: Batcher[Any, Any] = Batcher(log, max_batch_size=4, sessions=sessions, max_waiting=500)
    batcher.start()
    yield batcher
    log.held.set()
    batcher.close(timeout=10)


def answers(futures: Sequence["Future[Any]"]) -> list[Any]:
    return [future.result(timeout=20) for future in futures]


@pytest.mark.parametrize("key", ["one", "batch"])
def test_an_item_runs_alone_beside_a_full_load(
    batcher: Batcher[Any, Any], log: Log, key: str
) -> None:
    dice = random.Random(3)
    keys = ("one", "two", "batch", "other")
    load = [batcher.submit((f"{n}", dice.randint(1, 9)), dice.choice(keys)) for n in range(60)]
    wait_until(lambda: len(log.ran) > 3, "the load to run")
    alone = batcher.submit(("alone", 5), key, priority=2, alone=True)
    load += [batcher.submit((f"{n}", dice.randint(1, 9)), dice.choice(keys)) for n in range(60, 99)]
    assert alone.result(20) == "alone"
    assert answers(load) == [f"{n}" for n in range(99)]
    assert log.together("alone") == set()
    assert all(names == ["alone"] for _, names in log.span("alone"))
    assert any("98" in names for _, names in log.ran)


def test_what_runs_ends_and_nobody_enters_before_it(batcher: Batcher[Any, Any], log: Log) -> None:
    log.held.clear()
    running = batcher.submit(("running", 4), "one")
    wait_until(lambda: len(log.ran) == 1, "the first step")
    alone = batcher.submit(("alone", 2), "two", alone=True)
    urgent = [batcher.submit((name, 1), "one", priority=-1) for name in ("x", "y")]
    log.held.set()
    assert answers([running, alone, *urgent]) == ["running", "alone", "x", "y"]
    names = [name for _, together in log.ran for name in together]
    assert names[:6] == ["running"] * 4 + ["alone"] * 2


def test_several_run_one_after_the_other(batcher: Batcher[Any, Any], log: Log) -> None:
    log.held.clear()
    running = batcher.submit(("running", 2), "one")
    wait_until(lambda: len(log.ran) == 1, "the first step")
    alone = [batcher.submit((f"{n}", 2), key, alone=True) for n, key in enumerate(("one", "b") * 3)]
    other = batcher.submit(("other", 1), "one")
    log.held.set()
    assert answers([running, *alone, other]) == ["running", *"012345", "other"]
    assert all(log.together(f"{n}") == set() for n in range(6))


@pytest.mark.parametrize("key", ["one", "batch"])
def test_others_have_a_turn_between_two_of_them(
    batcher: Batcher[Any, Any], log: Log, key: str
) -> None:
    """Whoever always has another one that must run alone would have the model to himself."""
    log.held.clear()
    batcher.submit(("running", 1), "one")
    wait_until(lambda: len(log.ran) == 1, "the first step")
    alone = [batcher.submit((f"{n}", 2), "two", alone=True) for n in range(6)]
    others = [batcher.submit((name, 1), key, priority=2) for name in ("x", "y")]
    log.held.set()
    assert answers([*alone, *others]) == [*"012345", "x", "y"]
    names = [name for _, together in log.ran for name in together]
    assert names[:5] == ["running", "0", "0", "x", "y"]
    assert all(log.together(f"{n}") == set() for n in range(6))


def test_one_that_is_given_up_keeps_nobody_waiting(batcher: Batcher[Any, Any], log: Log) -> None:
    log.held.clear()
    batcher.submit(("running", 2), "one")
    wait_until(lambda: len(log.ran) == 1, "the first step")
    waiting = batcher.submit(("waiting", 1), "one", alone=True)
    other = batcher.submit(("other", 1), "one")
    assert waiting.cancel()
    log.held.set()
    assert other.result(20) == "other"
    endless = batcher.submit(("endless", 10**9), "two", alone=True)
    wait_until(lambda: log.ran[-1] == ("two", ["endless"]), "it to run")
    other = batcher.submit(("another", 1), "one")
    assert endless.cancel()
    assert other.result(20) == "another"


def test_one_that_fails_keeps_nobody_waiting(batcher: Batcher[Any, Any], log: Log) -> None:
    bad = batcher.submit("cannot join: no pair", "one", alone=True)
    worse = batcher.submit(7, "batch", alone=True)
    for future in (bad, worse):
        with pytest.raises((TypeError, ValueError, AttributeError, IndexError)):
            future.result(20)
    assert batcher.submit(("other", 1), "one").result(20) == "other"


def test_closing_runs_it_too(batcher: Batcher[Any, Any], log: Log) -> None:
    futures = [batcher.submit((f"{n}", 3), "one", alone=n % 2 == 0) for n in range(6)]
    batcher.close(timeout=20)
    assert [future.result(0) for future in futures] == list("012345")
