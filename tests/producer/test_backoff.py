"""Pauses between tries: they grow to a cap, and jitter spreads them."""

import pytest

from blipq.backoff import Backoff


def test_pauses_double_up_to_the_cap() -> None:
    backoff = Backoff(0.2, 5.0)
    assert [backoff.pause_s(tries) for tries in range(7)] == [0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]


def test_pauses_may_grow_by_another_factor() -> None:
    backoff = Backoff(1.0, 3.0, factor=1.5)
    assert [backoff.pause_s(tries) for tries in range(4)] == [1.0, 1.5, 2.25, 3.0]


@pytest.mark.parametrize("tries", [1023, 1024, 10**9])
def test_an_outage_of_a_day_overflows_nothing(tries: int) -> None:
    """2.0 ** 1024 raises OverflowError: at pauses of 5 s a loop counts so far in 90 minutes."""
    assert Backoff(0.2, 5.0).pause_s(tries) == 5.0


def test_the_first_pause_keeps_to_the_cap_too() -> None:
    assert Backoff(90.0, 60.0).pause_s(0) == 60.0


def test_jitter_spreads_pauses_around_the_exponential_one() -> None:
    backoff = Backoff(1.0, 60.0, jitter=0.5)
    pauses = [backoff.pause_s(2) for _ in range(200)]
    assert all(2.0 <= pause <= 6.0 for pause in pauses)
    assert min(pauses) < 3.5 < 4.5 < max(pauses), "200 draws fall on both sides of the middle"
