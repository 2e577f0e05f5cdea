"""How fast a bulk submits, by a clock of the test's own."""

import json
from datetime import UTC, datetime, timedelta

import pytest

from blipq import InvalidRequest
from blipq.bulk.journal import OpenLine
from blipq.bulk.manners import Hosts, Manners, Pace, host_of, next_time


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def line(number: int, uri: str) -> OpenLine:
    return OpenLine(number, f"job-{number}", json.dumps({"request": {"image": {"uri": uri}}}))


@pytest.mark.parametrize("rate", [0.5, 3, 100])
def test_no_more_goes_than_the_rate_and_none_of_it_is_lost(rate: float) -> None:
    clock = Clock()
    pace = Pace(rate, clock)
    went = 0
    for _ in range(1000):
        room = pace.room(200)
        pace.took(room)
        went += room
        clock.now += 0.1
    assert 99.9 * rate - 1 <= went <= 100 * rate + 1


def test_a_long_pause_makes_up_for_one_second_alone() -> None:
    clock = Clock()
    pace = Pace(10, clock)
    clock.now += 3600
    assert pace.room(1000) == 10


def test_without_a_rate_all_may_go() -> None:
    assert Pace(None).room(200) == 200


def test_a_web_host_is_visited_at_its_rate_and_holds_up_nobody_else() -> None:
    clock = Clock()
    hosts = Hosts(2, clock)
    slow = [line(number, f"https://slow.example/{number}.jpg") for number in range(10)]
    others = [line(10, "s3://photos/10.jpg"), line(11, "https://other.example/11.jpg")]
    went = hosts.admitted([*slow, *others])
    assert {each.number for each in went} == {0, 10, 11}
    assert len(hosts) == 9
    numbers = [each.number for each in went if "slow" in each.work]
    for _ in range(10):
        clock.now += 0.5
        numbers += [each.number for each in hosts.admitted([])]
    assert numbers == list(range(10))
    assert not hosts


def test_hosts_that_nothing_waits_for_are_forgotten() -> None:
    clock = Clock()
    hosts = Hosts(5, clock)
    for number in range(1000):
        hosts.admitted([line(number, f"https://host-{number}.example/a.jpg")])
        clock.now += 1
    assert len(hosts._paces) < 5


def test_lines_of_a_host_that_are_taken_back_wait_no_more() -> None:
    hosts = Hosts(1, Clock())
    hosts.admitted([line(number, "https://slow.example/a.jpg") for number in range(3)])
    assert [each.number for each in hosts.all()] == [1, 2]
    assert not hosts


def test_what_is_in_s3_or_has_no_picture_is_of_no_host() -> None:
    assert host_of(line(1, "s3://photos/1.jpg").work) is None
    assert host_of(json.dumps({"request": {"kind": "embed", "text": "a cat"}})) is None
    assert host_of(line(1, "https://a.example:443/1.jpg").work) == "a.example"


def test_a_time_of_day_is_the_next_one() -> None:
    now = datetime.now(UTC)
    for text in ("00:00", "06:00", "23:59"):
        at = next_time(text)
        assert now < at <= now + timedelta(hours=25)
        assert f"{at.astimezone():%H:%M}" == text
    with pytest.raises(InvalidRequest, match="such as 06:00"):
        next_time("6 o'clock")
    assert Manners(until=now).is_over
    assert not Manners(until=now + timedelta(hours=1)).is_over
    assert not Manners().is_over
