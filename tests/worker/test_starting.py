"""A worker says where its start spent its time."""

import logging

import pytest

from blipq_worker.startup import Start


def test_parts_of_one_name_add_up_and_the_rest_is_told(caplog: pytest.LogCaptureFixture) -> None:
    times = iter([0.0, 1.0, 3.0, 4.0, 4.5, 5.0, 6.0, 7.25])
    start = Start(lambda: next(times))
    with caplog.at_level(logging.INFO, logger="blipq_worker"):
        for name in ("imports", "canary", "imports"):
            with start.part(name):
                pass
    assert caplog.messages == [
        "start: imports took 2.0 s",
        "start: canary took 0.5 s",
        "start: imports took 1.0 s",
    ]
    assert str(start) == "7.2 s: imports 3.0, canary 0.5, other 3.8"


def test_the_first_result_alone_is_told_with_what_came_before_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    times = iter([0.0, 8.0, 8.0, 11.5])
    start = Start(lambda: next(times))
    with caplog.at_level(logging.INFO, logger="blipq_worker"):
        start.job_succeeded(0.5)  # before it is ready, as in tests of jobs
        start.ready()
        start.job_succeeded(0.5)
        start.job_succeeded(0.5)
    assert caplog.messages == [
        "ready after 8.0 s: other 8.0",
        "first result 11.5 s after the start: ready 8.0, waited for a job 3.0, ran it 0.5",
    ]
