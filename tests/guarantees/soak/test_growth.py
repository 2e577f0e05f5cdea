"""A process that grows is found out, and one that fills its caches first is not."""

import pytest

from guarantees.soak.growth import Sample, growth_of

HOUR_S = 3600


def life(mib: list[float], files: list[int] | None = None) -> list[Sample]:
    """A sample a minute."""
    of = files or [20] * len(mib)
    return [Sample(60.0 * n, each, of[n]) for n, each in enumerate(mib)]


@pytest.mark.parametrize("mib_a_minute", [0.6, 2.0])
def test_memory_that_grows_all_the_time_is_found_out(mib_a_minute: float) -> None:
    found = growth_of("front", life([100 + mib_a_minute * n for n in range(60)]))
    assert found is not None
    assert found.mib_an_hour == pytest.approx(60 * mib_a_minute)
    assert not found.is_flat


def test_caches_that_fill_first_and_noise_are_no_growth() -> None:
    found = growth_of("engine", life([min(600.0, 100 + 40 * n) + 5 * (n % 3) for n in range(60)]))
    assert found is not None
    assert found.is_flat


def test_files_that_are_never_closed_are_found_out() -> None:
    found = growth_of("door", life([100.0] * 60, list(range(20, 80))))
    assert found is not None
    assert not found.is_flat


def test_a_short_life_is_not_judged() -> None:
    assert growth_of("front", life([1.0, 500.0, 900.0])) is None
