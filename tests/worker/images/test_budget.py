"""Who may hold how many bytes, and in which order."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import pytest

from blipq.errors import TransientError
from blipq_worker.images.memory_budget import Budget
from conftest import wait_until


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def is_refused(budget: Budget, amount: int) -> bool:
    with suppress(TransientError), budget.reserve(amount, timeout=0.01):
        return False
    return True


def holder(
    threads: ThreadPoolExecutor, budget: Budget, amount: int
) -> tuple[threading.Event, threading.Event, "Future[None]"]:
    """Somebody who holds a share: when it is granted, what ends it, and the thread."""
    granted, done = threading.Event(), threading.Event()

    def hold() -> None:
        with budget.reserve(amount, timeout=10):
            granted.set()
            assert done.wait(10)

    return granted, done, threads.submit(hold)


def test_shares_are_granted_while_bytes_are_left() -> None:
    budget = Budget(10, most=4)
    with budget.reserve(6, timeout=1), budget.reserve(4, timeout=1):
        assert is_refused(budget, 1)
    assert not is_refused(budget, 10)


def test_no_more_shares_than_the_most_are_granted() -> None:
    budget = Budget(10, most=1)
    with budget.reserve(1, timeout=1):
        assert is_refused(budget, 1)


def test_who_waits_too_long_is_told_for_what_and_which_setting_bounds_it() -> None:
    budget = Budget(10, most=4, use="to decode an image (BLIPQ_DECODE_MEMORY_BYTES)")
    told = r"3 bytes to decode an image \(BLIPQ_DECODE_MEMORY_BYTES\) were not free within 0\.01 s"
    with (
        budget.reserve(8, timeout=1),
        pytest.raises(TransientError, match=told),
        budget.reserve(3, timeout=0.01),
    ):
        pass


def test_what_is_larger_than_the_budget_runs_alone() -> None:
    budget = Budget(10, most=4)
    with budget.reserve(1_000, timeout=1):
        assert is_refused(budget, 1)


def test_a_small_one_does_not_overtake_a_large_one_that_waits(threads: ThreadPoolExecutor) -> None:
    budget = Budget(10, most=4)
    with budget.reserve(6, timeout=1):
        large, large_done, first = holder(threads, budget, 10)
        wait_until(lambda: len(budget._waiting) == 1, "the large one to wait")
        small, small_done, second = holder(threads, budget, 1)
        wait_until(lambda: len(budget._waiting) == 2, "the small one to wait")
        assert not small.is_set()
    assert large.wait(10)
    assert not small.is_set()
    large_done.set()
    assert small.wait(10)
    small_done.set()
    first.result(10)
    second.result(10)


def test_one_that_gave_up_does_not_stand_in_the_way() -> None:
    budget = Budget(10, most=4)
    with budget.reserve(6, timeout=1):
        assert is_refused(budget, 10)
        assert not is_refused(budget, 4)


def test_what_a_share_does_not_need_goes_to_the_next() -> None:
    budget = Budget(10, most=4)
    with budget.reserve(10, timeout=1) as share:
        share.shrink(3)
        assert not is_refused(budget, 7)


def test_it_says_how_long_the_oldest_share_has_been_held() -> None:
    budget = Budget(10, most=4)
    assert budget.held_for() == 0
    with budget.reserve(1, timeout=1):
        wait_until(lambda: budget.held_for() > 0.05, "time to pass")
        with budget.reserve(1, timeout=1):
            assert budget.held_for() > 0.05
    assert budget.held_for() == 0
