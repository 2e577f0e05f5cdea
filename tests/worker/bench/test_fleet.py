"""The simulated fleet: it does what arithmetic says where that is simple, and loses no job."""

import math

import pytest
from benchmarks.fleet import scenarios
from benchmarks.fleet.costs import Costs, Gpu
from benchmarks.fleet.simulation import SWEEP_S, Cell, Fleet, Group
from hypothesis import given
from hypothesis import strategies as st

GPU = Gpu(pass_s=0.04, row_s=0.01, batch=4, held=8, lease_s=3.0, cold_s=5.0)
FREE = Costs(0.0, 0.0, 0.0)


def backlog(jobs: int, gpus: int = 1, cells: int = 1, costs: Costs = FREE) -> Fleet:
    fleet = Fleet(cells, gpus, GPU, costs)
    for cell in fleet.cells:
        fleet.submit(cell, jobs)
    return fleet


def test_a_backlog_takes_as_long_as_its_passes() -> None:
    fleet = backlog(400)
    fleet.run(drained=True)
    assert fleet.jobs_ended() == 400
    assert fleet.now == pytest.approx(400 / GPU.per_s) == pytest.approx(8.0)
    assert fleet.latency(0.5) == pytest.approx(4.0, abs=0.1)


def test_twice_the_workers_take_half_the_time_until_redis_is_full() -> None:
    costs = Costs(submit_us=0, work_us=1000, idle_us=0)  # 1,000 jobs a second
    rates = {}
    for gpus in (1, 2, 10, 40):
        fleet = backlog(4000, gpus, costs=costs)
        fleet.run(drained=True)
        rates[gpus] = 4000 / fleet.now
    assert rates[2] == pytest.approx(2 * rates[1], rel=0.01)
    assert rates[10] == pytest.approx(500, rel=0.05)
    assert rates[40] == pytest.approx(1000, rel=0.05)
    assert fleet.redis_busy(fleet.now) == pytest.approx(1, rel=0.05)


def test_the_jobs_of_a_killed_worker_come_back_after_its_lease_each_alone() -> None:
    fleet = backlog(400, 2)
    fleet.run(1.0)
    held = fleet.kill(fleet.cells[0].workers[0], restarts=False)
    assert held == GPU.held
    fleet.run(drained=True)
    assert fleet.jobs_ended() == 400
    alone = [each for each in fleet.ended if each.alone]
    assert [each.count for each in alone] == [1] * held
    assert min(each.at for each in alone) > 1.0 + GPU.lease_s + SWEEP_S


def test_a_worker_that_is_killed_serves_again_after_its_start() -> None:
    fleet = backlog(4)
    fleet.run(0.01)
    fleet.kill(fleet.cells[0].workers[0])
    fleet.run(drained=True)
    assert fleet.now == pytest.approx(0.01 + GPU.cold_s + 4 * 0.05)


def test_jobs_go_past_a_redis_that_is_away_and_its_own_wait_for_it() -> None:
    fleet = Fleet(2, 4, GPU, FREE)
    offered = 0.45 * 4 * GPU.per_s
    fleet.arriving(lambda now: offered, 20.0)
    fleet.at(5.0, fleet.stop_redis, fleet.cells[0], 10.0)
    fleet.run(40.0)
    assert not any(cell.open for cell in fleet.cells)
    late = [each for each in fleet.ended if each.took > 5]
    assert 0 < sum(each.count for each in late) <= 6 * GPU.batch  # those that were in it
    assert fleet.jobs_ended() == pytest.approx(offered * 20, rel=0.1)


def test_jobs_come_at_the_rate_that_is_offered() -> None:
    fleet = Fleet(1, 20, GPU, FREE)
    fleet.arriving(lambda now: 700.0, 10.0)
    fleet.run(12.0)
    assert fleet.jobs_ended() == pytest.approx(7000, rel=0.05)


@given(
    groups=st.lists(st.tuples(st.integers(1, 9), st.booleans()), max_size=8),
    most=st.integers(1, 6),
)
def test_a_pass_takes_the_oldest_and_a_suspect_alone(
    groups: list[tuple[int, bool]], most: int
) -> None:
    cell = Cell()
    for number, (count, alone) in enumerate(groups):
        cell.add(Group(number, count, alone))
    times: list[float] = []
    while taken := cell.take(most):
        count = sum(each.count for each in taken)
        assert 1 <= count <= most
        if any(each.alone for each in taken):
            assert count == 1
        times += [each.at for each in taken for _ in range(each.count)]
    assert cell.waiting == 0
    assert len(times) == sum(count for count, _ in groups)
    assert times == sorted(times)


def test_every_scenario_ends_with_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenarios, "FLEETS", ((1, 1), (4, 2)))
    monkeypatch.setattr(scenarios, "EVENTS_FLEET", (4, 2))
    costs = Costs(submit_us=210, work_us=155, idle_us=500, open_bytes=1700, ended_bytes=1000)
    found = scenarios.simulated(costs, GPU)
    one, two = found["steady"]
    assert two["per_s"] == pytest.approx(4 * one["per_s"], rel=0.05)
    assert found["redis"]["gpus"] == pytest.approx(0.7e6 / 365 / (0.8 * GPU.per_s))
    for name, each in found["events"].items():
        assert all(math.isfinite(value) for value in each.values()), name
    waits = {name: each["longest_s"] for name, each in found["events"].items()}
    assert waits["half of the GPUs killed"] > waits["nothing"]
