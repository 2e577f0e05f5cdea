"""Equal items that are in flight together run once, and none of them depends on another's fate."""

import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from typing import Any

import pytest

from blipq_worker.batching.batcher import Batcher
from conftest import wait_until


class Model:
    """Says what it was given, once it is let go. ``long`` items stay in a session until then."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.ran: list[Any] = []
        self.left: list[Any] = []
        self.started: list[Future[Any]] = []

    def __call__(
        self, key: Hashable, items: Sequence[Any], wanted: Callable[[int], bool]
    ) -> list[Any]:
        self.ran += items
        assert self.go.wait(20)
        if "poison" in items:
            raise ValueError("poison")
        return list(items)


class Long:
    """A session whose items end when the model is let go."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._items: dict[Any, Any] = {}

    def has_room(self, ticket: Any) -> bool:
        return len(self._items) < 2

    def join(self, ticket: Any, item: Any) -> None:
        self._model.ran.append(item)
        self._items[ticket] = item

    def leave(self, ticket: Any) -> None:
        self._model.left.append(self._items.pop(ticket))

    def step(self, tickets: Sequence[Any]) -> list[tuple[Any, Any]]:
        time.sleep(0.001)
        if not self._model.go.is_set():
            return []
        return [(ticket, self._items.pop(ticket)) for ticket in tickets]


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def batcher(model: Model) -> Iterator[Batcher[Any, Any]]:
    batcher: Batcher[Any, Any] = Batcher(
        model,
        max_batch_size=4,
        sessions={"long": lambda: Long(model)},
        on_start=model.started.extend,
        shared=lambda answer: f"{answer}, shared",
    )
    batcher.start()
    yield batcher
    model.go.set()
    batcher.close(timeout=10)
    assert not batcher._in_flight
    assert not len(batcher._waiting)


@pytest.fixture(params=["k", "long"])
def key(request: pytest.FixtureRequest) -> str:
    """Items of a batch, and items of a session."""
    found: str = request.param
    return found


def running(batcher: Batcher[Any, Any], model: Model, key: str, item: Any = "a") -> "Future[Any]":
    """An item that runs."""
    before = len(model.ran)
    future = batcher.submit(item, key, same=item)
    wait_until(lambda: len(model.ran) > before, "the first")
    wait_until(lambda: future in model.started, "its start to be told")
    return future


def test_equal_items_run_once(batcher: Batcher[Any, Any], model: Model, key: str) -> None:
    first = running(batcher, model, key)
    others = [batcher.submit("a", key, same="a") for _ in range(3)]
    model.go.set()
    assert first.result(10) == "a"
    assert [each.result(10) for each in others] == ["a, shared"] * 3
    assert model.ran == ["a"]


def test_other_items_run_for_themselves(batcher: Batcher[Any, Any], model: Model, key: str) -> None:
    running(batcher, model, key)
    others = [
        batcher.submit("b", key, same="b"),
        batcher.submit("a", key),
        batcher.submit("a", "another", same="a"),
        batcher.submit("a", key, same="a", alone=True),
    ]
    model.go.set()
    assert [each.result(10) for each in others] == ["b", "a", "a", "a"]


def test_an_item_that_comes_after_the_answer_runs_again(
    batcher: Batcher[Any, Any], model: Model, key: str
) -> None:
    model.go.set()
    for _ in range(2):
        assert batcher.submit("a", key, same="a").result(10) == "a"
    assert model.ran == ["a", "a"]


def test_a_cancelled_item_takes_no_equal_one_along(
    batcher: Batcher[Any, Any], model: Model, key: str
) -> None:
    first = running(batcher, model, key)
    other = batcher.submit("a", key, same="a")
    assert first.cancel()
    time.sleep(0.05)
    model.go.set()
    assert other.result(10) == "a"  # the pass is its own now
    assert (model.ran, model.left) == (["a"], [])


def test_who_comes_and_goes_leaves_nothing_at_an_item_that_runs(
    batcher: Batcher[Any, Any], model: Model, key: str
) -> None:
    running(batcher, model, key)
    for _ in range(1000):
        batcher.submit("a", key, same="a").cancel()
    (entry,) = batcher._in_flight.values()
    assert len(entry.waiters) == 1


def test_an_item_leaves_with_the_last_that_waits_for_it(
    batcher: Batcher[Any, Any], model: Model
) -> None:
    futures = [running(batcher, model, "long"), batcher.submit("a", "long", same="a")]
    assert all(future.cancel() for future in futures)
    again = batcher.submit("a", "long", same="a")
    wait_until(lambda: model.left == ["a"], "the end of the first")
    model.go.set()
    assert again.result(10) == "a"
    assert model.ran == ["a", "a"]


def test_what_was_given_up_while_it_ran_answers_nobody(
    batcher: Batcher[Any, Any], model: Model
) -> None:
    """From then on the model may stop within a text: an equal item must run anew."""
    assert running(batcher, model, "k").cancel()
    again = batcher.submit("a", "k", same="a")
    model.go.set()
    assert again.result(10) == "a"
    assert model.ran == ["a", "a"]


def test_each_has_its_own_deadline(batcher: Batcher[Any, Any], model: Model) -> None:
    first = running(batcher, model, "long")
    late = batcher.submit("a", "long", same="a", deadline=time.monotonic() + 0.1)
    with pytest.raises(CancelledError):
        late.result(10)
    model.go.set()
    assert first.result(10) == "a"


def test_the_failure_of_an_item_is_that_of_its_equals(
    batcher: Batcher[Any, Any], model: Model
) -> None:
    futures = [running(batcher, model, "k", "poison"), batcher.submit("poison", "k", same="poison")]
    model.go.set()
    for future in futures:
        with pytest.raises(ValueError, match="poison"):
            future.result(10)
    assert batcher.submit("b", "k", same="b").result(10) == "b"


def test_an_urgent_item_hurries_its_equal_that_waits(
    batcher: Batcher[Any, Any], model: Model
) -> None:
    running(batcher, model, "k", "first")
    slow = [batcher.submit(name, name, same=name, priority=2) for name in "abc"]
    batcher.submit("c", "c", same="c", priority=0)
    model.go.set()
    assert [each.result(10) for each in slow] == ["a", "b", "c"]
    assert model.ran == ["first", "c", "a", "b"]


def test_the_start_of_an_item_is_told_to_all_that_wait_for_it_once(
    batcher: Batcher[Any, Any], model: Model
) -> None:
    before = running(batcher, model, "long", "first")
    futures = [running(batcher, model, "long"), batcher.submit("a", "long", same="a")]
    wait_until(lambda: len(model.started) == 3, "the one that came late")
    waiting = batcher.submit("b", "long", same="b")
    time.sleep(0.05)
    assert waiting not in model.started
    model.go.set()
    assert waiting.result(10) == "b"
    assert model.started == [before, *futures, waiting]


def test_an_item_that_is_over_is_not_kept_by_its_future(
    batcher: Batcher[Any, Any], model: Model
) -> None:
    model.go.set()
    future = batcher.submit("a", "k", same="a")
    assert future.result(10) == "a"
    (found,) = [callback.args[0] for callback in future._done_callbacks]  # type: ignore[attr-defined]
    wait_until(lambda: found() is None, "the item to go")
