"""Jobs that run together get the answers they would get alone.

The model here is honest: it doubles numbers, and refuses what is no number.
"""

import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from typing import Any

import pytest

from blipq_worker.batching.batcher import Batcher
from blipq_worker.batching.interface import BatcherClosed, BatcherFull
from conftest import wait_until


class Doubler:
    """Doubles numbers, and remembers its batches; while it is held, it does not answer."""

    def __init__(self) -> None:
        self.batches: list[tuple[Hashable, list[Any]]] = []
        self.free = threading.Event()
        self.free.set()
        self.given_up: list[Any] = []

    def hold_the_next(self) -> None:
        """Lets the running batch go, but not the one after it."""
        free, self.free = self.free, threading.Event()
        free.set()

    def __call__(
        self, key: Hashable, items: Sequence[Any], wanted: Callable[[int], bool]
    ) -> list[Any]:
        free = self.free
        self.batches.append((key, list(items)))
        assert free.wait(10)
        self.given_up += [item for index, item in enumerate(items) if not wanted(index)]
        if "poison" in items:
            raise ValueError("poison is no number")
        return [2 * item for item in items]


@pytest.fixture
def model() -> Doubler:
    return Doubler()


@pytest.fixture
def make(model: Doubler) -> Iterator[Callable[..., Batcher[Any, Any]]]:
    """Starts a batcher; closes it after the test."""
    made: list[Batcher[Any, Any]] = []

    def make(run: Any = model, **options: Any) -> Batcher[Any, Any]:
        batcher: Batcher[Any, Any] = Batcher(run, **{"max_batch_size": 4, **options})
        batcher.start()
        made.append(batcher)
        return batcher

    yield make
    model.free.set()
    for batcher in made:
        batcher.close(timeout=10)


@pytest.fixture
def busy(make: Callable[..., Batcher[Any, Any]], model: Doubler) -> Batcher[Any, Any]:
    """A batcher whose model is at work on another item, until ``model.free`` is set."""
    batcher = make()
    model.free.clear()
    batcher.submit(0, "first")
    wait_until(lambda: model.batches, "the first batch")
    return batcher


def answers(futures: Sequence["Future[Any]"]) -> list[Any]:
    return [future.result(timeout=10) for future in futures]


def test_each_item_gets_its_own_answer(make: Callable[..., Batcher[Any, Any]]) -> None:
    batcher = make()
    assert answers([batcher.submit(number, "k") for number in range(9)]) == list(range(0, 18, 2))


def test_items_that_wait_run_together(busy: Batcher[Any, Any], model: Doubler) -> None:
    futures = [busy.submit(number, "k") for number in (1, 2, 3)]
    model.free.set()
    assert answers(futures) == [2, 4, 6]
    assert model.batches[1:] == [("k", [1, 2, 3])]


def test_a_batch_has_a_largest_size(busy: Batcher[Any, Any], model: Doubler) -> None:
    futures = [busy.submit(number, "k") for number in range(6)]
    model.free.set()
    answers(futures)
    assert model.batches[1:] == [("k", [0, 1, 2, 3]), ("k", [4, 5])]


def test_items_of_different_keys_never_run_together(
    busy: Batcher[Any, Any], model: Doubler
) -> None:
    futures = [busy.submit(number, number % 2) for number in range(6)]
    model.free.set()
    assert answers(futures) == [0, 2, 4, 6, 8, 10]
    assert model.batches[1:] == [(0, [0, 2, 4]), (1, [1, 3, 5])]


def test_the_most_urgent_item_runs_first_and_takes_company_along(
    busy: Batcher[Any, Any], model: Doubler
) -> None:
    futures = [busy.submit(1, "slow", priority=2), busy.submit(2, "fast", priority=1)]
    futures += [busy.submit(3, "slow", priority=0), busy.submit(4, "slow", priority=1)]
    model.free.set()
    answers(futures)
    assert model.batches[1:] == [("slow", [3, 4, 1]), ("fast", [2])]


def test_equally_urgent_items_run_in_the_order_they_came(
    busy: Batcher[Any, Any], model: Doubler
) -> None:
    futures = [busy.submit(number, number) for number in (5, 3, 4)]
    model.free.set()
    answers(futures)
    assert [key for key, _ in model.batches[1:]] == [5, 3, 4]


def test_the_first_item_waits_for_company_within_the_window(
    make: Callable[..., Batcher[Any, Any]], model: Doubler
) -> None:
    batcher = make(batch_wait_timeout_s=30, max_batch_size=2)
    assert answers([batcher.submit(1, "k"), batcher.submit(2, "k")]) == [2, 4]
    assert model.batches == [("k", [1, 2])]


def test_the_window_ends(make: Callable[..., Batcher[Any, Any]]) -> None:
    assert make(batch_wait_timeout_s=0.02).submit(1, "k").result(timeout=10) == 2


def test_an_item_alone_does_not_wait_without_a_window(
    make: Callable[..., Batcher[Any, Any]],
) -> None:
    assert make().submit(1, "k").result(timeout=10) == 2


def test_a_bad_item_fails_alone(busy: Batcher[Any, Any], model: Doubler) -> None:
    futures = [busy.submit(item, "k") for item in (1, 2, "poison", 3)]
    model.free.set()
    assert answers([*futures[:2], futures[3]]) == [2, 4, 6]
    with pytest.raises(ValueError, match="poison"):
        futures[2].result(timeout=10)


def test_halving_keeps_the_order(busy: Batcher[Any, Any], model: Doubler) -> None:
    futures = [busy.submit(item, "k") for item in ("poison", 1, 2, 3)]
    model.free.set()
    answers(futures[1:])
    batches = [items for _, items in model.batches[1:]]
    assert batches == [["poison", 1, 2, 3], ["poison", 1], ["poison"], [1], [2, 3]]


def test_the_batcher_outlives_a_failing_model(make: Callable[..., Batcher[Any, Any]]) -> None:
    batcher = make()
    with pytest.raises(ValueError, match="poison"):
        batcher.submit("poison", "k").result(timeout=10)
    assert batcher.submit(1, "k").result(timeout=10) == 2


def test_a_cancelled_item_is_not_run(busy: Batcher[Any, Any], model: Doubler) -> None:
    unwanted, wanted = busy.submit(1, "k"), busy.submit(2, "k")
    assert unwanted.cancel()
    model.free.set()
    assert wanted.result(timeout=10) == 4
    assert model.batches[1:] == [("k", [2])]
    with pytest.raises(CancelledError):
        unwanted.result(timeout=10)


def test_a_batch_of_cancelled_items_is_not_run(busy: Batcher[Any, Any], model: Doubler) -> None:
    busy.submit(1, "k").cancel()
    later = busy.submit(2, "later")
    model.free.set()
    assert later.result(timeout=10) == 4
    assert [key for key, _ in model.batches] == ["first", "later"]


def test_a_running_item_is_given_up_at_once_and_the_model_can_tell(
    busy: Batcher[Any, Any], model: Doubler
) -> None:
    unwanted, wanted = busy.submit(1, "k"), busy.submit(2, "k")
    model.hold_the_next()
    wait_until(lambda: len(model.batches) == 2, "the batch")
    assert unwanted.cancel()
    with pytest.raises(CancelledError):
        unwanted.result(timeout=0)
    model.free.set()
    assert wanted.result(timeout=10) == 4
    assert model.given_up == [1]


def test_an_item_is_cancelled_at_its_deadline(busy: Batcher[Any, Any], model: Doubler) -> None:
    late = busy.submit(1, "k", deadline=time.monotonic())
    soon = busy.submit(2, "k", deadline=time.monotonic() + 60)
    model.free.set()
    assert soon.result(timeout=10) == 4
    with pytest.raises(CancelledError):
        late.result(timeout=10)
    assert model.batches[1:] == [("k", [2])]


@pytest.mark.parametrize("given", [0, 2])
def test_a_model_that_answers_too_few_or_too_many_fails_its_jobs(
    make: Callable[..., Batcher[Any, Any]], given: int
) -> None:
    batcher = make(lambda key, items, wanted: [0] * given)
    with pytest.raises(RuntimeError, match=f"{given} answers for 1 items"):
        batcher.submit(1, "k").result(timeout=10)


def test_too_many_waiting_items_are_refused(
    make: Callable[..., Batcher[Any, Any]], model: Doubler
) -> None:
    batcher = make(max_waiting=1)
    model.free.clear()
    batcher.submit(0, "first")
    wait_until(lambda: model.batches, "the first batch")
    batcher.submit(1, "k")
    with pytest.raises(BatcherFull):
        batcher.submit(2, "k", timeout=0.01)


def test_room_comes_back(make: Callable[..., Batcher[Any, Any]]) -> None:
    batcher = make(max_waiting=1)
    futures = [batcher.submit(number, "k", timeout=10) for number in range(20)]
    assert answers(futures) == list(range(0, 40, 2))


def test_closing_runs_what_waits_and_refuses_the_rest(
    busy: Batcher[Any, Any], model: Doubler
) -> None:
    waiting = busy.submit(1, "k")
    model.free.set()
    busy.close(timeout=10)
    assert waiting.result(timeout=0) == 2
    with pytest.raises(BatcherClosed):
        busy.submit(2, "k")


def test_closing_cuts_the_window_short(make: Callable[..., Batcher[Any, Any]]) -> None:
    batcher = make(batch_wait_timeout_s=60)
    future = batcher.submit(1, "k")
    batcher.close(timeout=10)
    assert future.result(timeout=0) == 2


def test_a_running_batch_is_stalled_until_it_makes_progress(
    busy: Batcher[Any, Any], model: Doubler
) -> None:
    wait_until(lambda: busy.stalled_for() > 0.03, "the stall to grow")
    busy.progress()
    assert busy.stalled_for() < 0.03
    model.free.set()
    wait_until(lambda: busy.stalled_for() == 0, "the batch to end")


def test_many_threads_may_submit(make: Callable[..., Batcher[Any, Any]], model: Doubler) -> None:
    batcher, told = make(max_waiting=8), []

    def ask(number: int) -> None:
        told.append((number, batcher.submit(number, number % 3).result(timeout=10)))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(told) == [(number, 2 * number) for number in range(60)]
    assert all(len({item % 3 for item in items}) == 1 for _, items in model.batches)


# --- doubts ---------------------------------------------------------------------------------------


class Doubter:
    """Doubts after two failures; says whether the model is well when it is asked."""

    def __init__(self, *, well: bool) -> None:
        self.well = well
        self.failures = 0
        self.checks = 0

    def failed(self, key: Hashable, item: Any, error: Exception) -> None:
        self.failures += item is not None

    def answered(self, key: Hashable) -> None:
        self.failures = 0

    def doubts(self) -> bool:
        return self.failures >= 2

    def trusts(self) -> bool:
        self.checks += 1
        self.failures = 0
        return self.well


@pytest.mark.parametrize("in_flight", [False, True])
def test_in_doubt_the_model_is_checked_before_anyone_else_fails(
    make: Callable[..., Batcher[Any, Any]], in_flight: bool
) -> None:
    judge = Doubter(well=False)
    sessions = {"key": lambda: Broken()} if in_flight else {}
    batcher = make(broken, judge=judge, sessions=sessions, batch_wait_timeout_s=0.2)
    futures = [batcher.submit(number, "key") for number in range(4)]
    wait_until(lambda: judge.checks == 1, "the check")
    wait_until(lambda: sum(future.done() for future in futures) == 2, "two failures")
    time.sleep(0.2)
    assert [future.done() for future in futures] == [True, True, False, False]
    assert batcher.stalled_for() == 0


@pytest.mark.parametrize("in_flight", [False, True])
def test_who_waited_for_a_check_is_run_after_it(
    make: Callable[..., Batcher[Any, Any]], in_flight: bool
) -> None:
    judge = Doubter(well=True)
    sessions = {"key": lambda: Broken()} if in_flight else {}
    batcher = make(broken, judge=judge, sessions=sessions, batch_wait_timeout_s=0.2, max_waiting=4)
    futures = [batcher.submit(number, "key") for number in range(4)]
    for future in futures:
        with pytest.raises(RuntimeError, match="broken"):
            future.result(10)
    assert judge.checks == 2
    for _ in range(4):  # and took no places with it
        batcher.submit(1, "key", timeout=5)


def broken(key: Hashable, items: Sequence[Any], wanted: Callable[[int], bool]) -> list[Any]:
    raise RuntimeError("broken")


class Broken:
    """A session that takes items and never gets further."""

    def has_room(self, ticket: Any) -> bool:
        return True

    def join(self, ticket: Any, item: Any) -> None:
        pass

    def leave(self, ticket: Any) -> None:
        pass

    def step(self, tickets: Sequence[Any]) -> list[Any]:
        raise RuntimeError("broken")
