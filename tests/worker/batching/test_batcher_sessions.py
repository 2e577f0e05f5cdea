"""Items that join and leave: neither they nor batches wait for each other longer than they must.

The model here counts: an item ``n`` is done after ``n`` steps, and nothing is done before its time.
"""

import random
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from typing import Any

import pytest

from blipq_worker.batching.batcher import Batcher
from blipq_worker.batching.entries import Ticket
from blipq_worker.batching.interface import BatcherClosed, BatcherFull
from conftest import wait_until

SLOTS = 4


class Counter:
    """A session of four slots. ``poison`` raises at its second step, in any company."""

    def __init__(self, log: "Log") -> None:
        self._log = log
        self._left: dict[Ticket, Any] = {}
        self._items: dict[Ticket, Any] = {}
        log.opened += 1

    def has_room(self, ticket: Ticket) -> bool:
        return len(self._left) < SLOTS

    def join(self, ticket: Ticket, item: Any) -> None:
        assert len(self._left) < SLOTS
        if item == "nonsense":
            raise ValueError("nonsense is no number")
        self._items[ticket] = item
        self._left[ticket] = 2 if item == "poison" else item

    def leave(self, ticket: Ticket) -> None:
        self._log.left.append(self._items.pop(ticket))
        del self._left[ticket]

    def step(self, tickets: Sequence[Ticket]) -> list[tuple[Ticket, Any]]:
        self._log.begin([self._items[ticket] for ticket in tickets])
        if any(self._items[t] == "poison" and self._left[t] == 1 for t in tickets):
            raise ValueError("poison is no number")
        for ticket in tickets:
            self._left[ticket] -= 1
        done = [ticket for ticket in tickets if self._left[ticket] == 0]
        for ticket in done:
            del self._left[ticket]
        return [(ticket, self._items.pop(ticket)) for ticket in done]


class Log:
    """What ran, in order: steps as lists of items, batches as ``("batch", items)``.

    While it is held, what runs waits; ``turns`` lets single steps and batches through.
    """

    def __init__(self) -> None:
        self.ran: list[Any] = []
        self.left: list[Any] = []
        self.opened = 0
        self.held = False
        self.turns = threading.Semaphore(0)
        self.batch_s = 0.0
        self.free = threading.Event()

    def begin(self, what: Any) -> None:
        self.ran.append(what)
        if self.held:
            assert self.turns.acquire(timeout=10)

    def release(self) -> None:
        self.held = False
        self.turns.release(1000)

    def run(
        self, key: Hashable, items: Sequence[Any], wanted: Callable[[int], bool]
    ) -> Sequence[Any]:
        self.begin((key, list(items)))
        if "poison" in items:
            raise ValueError("poison is no number")
        time.sleep(self.batch_s)
        return list(items)

    def waits(self, number: int) -> None:
        """Until the n-th step or batch waits to be let through."""
        wait_until(lambda: len(self.ran) == number, f"{number} turns")


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def batcher(log: Log) -> Iterator[Batcher[Any, Any]]:
    sessions = {name: lambda: Counter(log) for name in ("session", "other session")}
    batcher: Batcher[Any, Any] = Batcher(
        log.run, max_batch_size=4, sessions=sessions, max_waiting=16
    )
    batcher.start()
    yield batcher
    log.release()
    batcher.close(timeout=10)


def answers(futures: Sequence["Future[Any]"]) -> list[Any]:
    return [future.result(timeout=10) for future in futures]


def test_items_leave_when_they_are_done_and_others_join_meanwhile(
    batcher: Batcher[Any, Any], log: Log
) -> None:
    log.held = True
    long = batcher.submit(4, "session")
    log.waits(1)
    short = batcher.submit(2, "session")
    log.turns.release(3)
    assert short.result(timeout=10) == 2
    assert not long.done()
    log.release()
    assert long.result(timeout=10) == 4
    assert log.ran == [[4], [4, 2], [4, 2], [4]]


def test_a_session_is_closed_when_it_is_empty(batcher: Batcher[Any, Any], log: Log) -> None:
    for number in (1, 2):
        assert batcher.submit(number, "session").result(timeout=10) == number
    wait_until(lambda: batcher.stalled_for() == 0, "the end")
    assert log.opened == 2


def test_who_finds_no_room_waits_and_the_most_urgent_comes_first(
    batcher: Batcher[Any, Any], log: Log
) -> None:
    log.held = True
    running = [batcher.submit(10 + number, "session") for number in range(SLOTS)]
    log.waits(1)
    late = [batcher.submit(1, "session", priority=1), batcher.submit(2, "session", priority=0)]
    running[0].cancel()
    log.turns.release(1)
    log.waits(2)
    assert log.ran[1] == [11, 12, 13, 2]
    log.release()
    assert answers(late) == [1, 2]


def test_a_bad_item_fails_alone_and_its_neighbours_lose_no_step(
    batcher: Batcher[Any, Any], log: Log
) -> None:
    log.held = True
    futures = [batcher.submit(item, "session") for item in (3, "poison", 4, 5)]
    log.waits(1)
    log.release()
    assert answers([futures[0], *futures[2:]]) == [3, 4, 5]
    with pytest.raises(ValueError, match="poison"):
        futures[1].result(timeout=10)
    assert log.left == ["poison"]
    assert sum(5 in step for step in log.ran) == 5 + 1  # one step, in bad company, was for nothing


def test_an_item_that_cannot_join_fails_alone(batcher: Batcher[Any, Any]) -> None:
    bad, good = batcher.submit("nonsense", "session"), batcher.submit(2, "session")
    assert good.result(timeout=10) == 2
    with pytest.raises(ValueError, match="nonsense"):
        bad.result(timeout=10)


def test_a_cancelled_item_leaves_before_the_next_step(batcher: Batcher[Any, Any], log: Log) -> None:
    log.held = True
    unwanted, wanted = batcher.submit(9, "session"), batcher.submit(3, "session")
    log.waits(1)
    assert unwanted.cancel()
    with pytest.raises(CancelledError):
        unwanted.result(timeout=0)
    log.release()
    assert wanted.result(timeout=10) == 3
    assert log.left == [9]
    assert not any(9 in step for step in log.ran[1:])


def test_an_item_leaves_at_its_deadline(batcher: Batcher[Any, Any], log: Log) -> None:
    log.held = True
    late = batcher.submit(10**9, "session", deadline=time.monotonic() + 0.2)
    log.waits(1)
    log.release()
    with pytest.raises(CancelledError):
        late.result(timeout=10)
    wait_until(lambda: log.left == [10**9], "the item to leave")


def test_a_batch_runs_between_two_steps(batcher: Batcher[Any, Any], log: Log) -> None:
    log.held = True
    long = batcher.submit(5, "session")
    log.waits(1)
    batched = batcher.submit(7, "batch")
    log.turns.release(2)
    assert batched.result(timeout=10) == 7
    assert not long.done()
    log.release()
    assert long.result(timeout=10) == 5
    assert log.ran[1] == ("batch", [7])


def test_neither_batches_nor_sessions_starve(batcher: Batcher[Any, Any], log: Log) -> None:
    log.batch_s = 0.005
    stop = time.monotonic() + 1.0
    futures: list[Future[Any]] = []

    def keep_busy(key: str) -> None:
        while time.monotonic() < stop:
            future = batcher.submit(3, key)
            futures.append(future)
            future.result(timeout=10)

    threads = [threading.Thread(target=keep_busy, args=(key,)) for key in ("session", "batch") * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert all(future.done() for future in futures)
    batches = sum(isinstance(each, tuple) for each in log.ran)
    steps = len(log.ran) - batches
    assert batches > 3
    assert steps > 3


def test_an_equally_urgent_batch_waits_while_the_sessions_have_their_share(
    batcher: Batcher[Any, Any], log: Log
) -> None:
    log.batch_s = 0.2
    endless = batcher.submit(10**9, "session")
    assert answers([batcher.submit(1, "batch")]) == [1]
    before = len(log.ran)
    assert answers([batcher.submit(2, "batch")]) == [2]
    assert len(log.ran) > before + 10, "the session did not run between the batches"
    endless.cancel()


def test_a_more_urgent_batch_does_not_wait_for_its_turn(
    batcher: Batcher[Any, Any], log: Log
) -> None:
    log.batch_s = 0.05
    log.held = True
    endless = batcher.submit(10**9, "session", priority=1)
    log.waits(1)
    first, second = batcher.submit(1, "first"), batcher.submit(2, "second")
    log.release()
    assert answers([first, second]) == [1, 2]
    batches = [number for number, each in enumerate(log.ran) if isinstance(each, tuple)]
    assert batches[1] - batches[0] == 2, "one step lies between the two"
    endless.cancel()


def test_sessions_run_beside_each_other(batcher: Batcher[Any, Any], log: Log) -> None:
    futures = [batcher.submit(50, "session"), batcher.submit(40, "other session")]
    assert answers(futures) == [50, 40]
    steps = [step for step in log.ran if isinstance(step, list)]
    assert steps.index([40]) < len(steps) - steps[::-1].index([50]) - 1


def test_closing_runs_what_waits_and_what_is_in_sessions(
    batcher: Batcher[Any, Any], log: Log
) -> None:
    log.held = True
    futures = [batcher.submit(number, "session") for number in range(1, 9)]
    log.waits(1)
    log.release()
    batcher.close(timeout=10)
    assert [future.result(timeout=0) for future in futures] == list(range(1, 9))
    with pytest.raises(BatcherClosed):
        batcher.submit(1, "session")


def test_waiting_items_take_room_and_running_ones_do_not(
    batcher: Batcher[Any, Any], log: Log
) -> None:
    log.held = True
    running = [batcher.submit(2, "session") for _ in range(SLOTS)]
    log.waits(1)
    waiting = [batcher.submit(2, "session") for _ in range(16)]
    with pytest.raises(BatcherFull):
        batcher.submit(2, "session", timeout=0.01)
    log.release()
    assert answers([*running, *waiting]) == [2] * (SLOTS + 16)


def test_every_step_is_progress_and_a_hanging_one_is_not(
    batcher: Batcher[Any, Any], log: Log
) -> None:
    log.held = True
    endless = batcher.submit(10**9, "session")
    log.waits(1)
    wait_until(lambda: batcher.stalled_for() > 0.05, "the stall to grow")
    log.release()
    wait_until(lambda: batcher.stalled_for() < 0.05, "progress")
    endless.cancel()
    wait_until(lambda: batcher.stalled_for() == 0, "the end")


@pytest.mark.parametrize("seed", range(5))
def test_any_order_of_coming_going_and_failing_answers_everyone(
    batcher: Batcher[Any, Any], log: Log, seed: int
) -> None:
    dice = random.Random(seed)
    futures: list[tuple[Any, Future[Any], bool]] = []
    for _ in range(150):
        item = dice.choice([1, 2, 3, 9, 30, "poison", "nonsense"])
        key = dice.choice(["session", "other session", "batch a", "batch b"])
        if item == "nonsense":
            key = "session"
        future = batcher.submit(item, key, priority=dice.randrange(3))
        futures.append((item, future, dice.random() < 0.2 and future.cancel()))
    for item, future, cancelled in futures:
        if cancelled:
            assert future.cancelled()
        elif isinstance(item, str):
            with pytest.raises(ValueError, match="is no number"):
                future.result(timeout=10)
        else:
            assert future.result(timeout=10) == item
    wait_until(lambda: batcher.stalled_for() == 0, "the end")
