"""Which jobs are polled, and when: no clock and no Redis needed."""

import time

import pytest

from blipq import JobInfo, JobNotFound, QueueUnavailable, ResultTimeout
from blipq.client.waiting import MAX_POLLED, Waiting
from blipq.ledger.codec import Polled


def ended(*ids: str) -> Polled:
    fields = {"kind": "caption", "model": "default", "status": "cancelled"}
    fields |= {"created_at": 0, "expires_at": 1, "completed_at": 0}
    infos = {id: JobInfo.model_validate({"id": id, **fields}) for id in ids}
    return Polled(infos, set(), {})


OPEN = ended()


def ids(count: int) -> list[str]:
    return [f"job_{number}" for number in range(count)]


def test_what_had_no_room_in_an_answer_is_polled_again_at_once() -> None:
    waiting = Waiting(["a", "b", "c"], timeout=60)
    due = waiting.due(subscribed_since=time.monotonic())
    found = ended("a")
    waiting.polled(due, Polled(found.ended, set(), {}, 60.0, frozenset(["c"])))
    assert waiting.pause() == 0
    assert waiting.due(subscribed_since=time.monotonic() - 1) == ["c"]


def test_every_job_is_polled_once_without_a_pause() -> None:
    waiting = Waiting(ids(3 * MAX_POLLED), timeout=60)
    seen: list[str] = []
    while waiting.pause() == 0:
        due = waiting.due()
        assert 0 < len(due) <= MAX_POLLED
        seen += due
        waiting.polled(due, OPEN)
    assert seen == ids(3 * MAX_POLLED)


def test_a_job_with_a_notification_is_polled_next() -> None:
    waiting = Waiting(ids(10), timeout=60)
    waiting.polled(waiting.due(), OPEN)
    waiting.notify(["job_7", "job_of_another_wait"])
    assert waiting.pause() == 0
    assert waiting.due() == ["job_7"]
    (info,) = waiting.polled(["job_7"], ended("job_7"))
    assert info.id == "job_7"
    assert "job_7" not in waiting.open


def test_thousands_are_polled_in_turn_the_longest_unseen_first() -> None:
    waiting = Waiting(ids(2 * MAX_POLLED), timeout=60)
    for _ in range(2):
        waiting.polled(waiting.due(), OPEN)
    assert 0.5 < waiting.pause() <= 1.25, "each half within about a second"
    waiting._poll_at = 0.0
    assert waiting.due() == ids(MAX_POLLED)


def test_single_waits_of_thousands_are_polled_as_rarely_and_in_step() -> None:
    waits = [Waiting([id], timeout=600) for id in ids(3)]
    for waiting in waits:
        waiting.polled(waiting.due(watched=20 * MAX_POLLED), OPEN)
        assert 19 < waiting.pause() <= 20.25
    assert len({waiting._poll_at for waiting in waits}) <= 2


def test_the_same_job_twice_is_waited_for_once() -> None:
    waiting = Waiting(["job_1", "job_1"], timeout=60)
    assert waiting.due() == ["job_1"]
    waiting.polled(["job_1"], ended("job_1"))
    assert not waiting.open


def test_the_time_is_up_only_after_a_look() -> None:
    waiting = Waiting(ids(2), timeout=0)
    assert waiting.pause() == 0
    waiting.polled(waiting.due(), OPEN)
    with pytest.raises(ResultTimeout, match="2 of 2 jobs have not ended after 0 s"):
        waiting.pause()


def test_an_outage_is_waited_out_and_told_when_the_time_is_up() -> None:
    waiting = Waiting(ids(2), timeout=60)
    waiting.polled(waiting.due(), QueueUnavailable("away"))
    assert waiting.pause() > 0
    waiting._ending = 0.0
    with pytest.raises(QueueUnavailable, match="away"):
        waiting.pause()


def test_after_an_outage_every_job_is_still_polled() -> None:
    waiting = Waiting(ids(2), timeout=60)
    due = waiting.due()
    waiting.polled(due, QueueUnavailable("away"))
    assert waiting.due() == due


def test_an_unknown_job_is_not_found() -> None:
    waiting = Waiting(ids(2), timeout=60)
    with pytest.raises(JobNotFound, match="job_1"):
        waiting.polled(waiting.due(), Polled({}, {"job_1"}, {}))


def test_without_a_timeout_nobody_waits_for_redis_beyond_the_deadlines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    away = QueueUnavailable("Redis is away")
    waiting = Waiting(ids(2), None, expire_within=60)
    waiting.polled(waiting.due(), Polled({}, set(), {}, left=10.0))  # told better by the ledger
    now[0] += 9
    waiting.polled(waiting.due(), away)
    assert waiting.pause() >= 0
    now[0] += 10
    with pytest.raises(QueueUnavailable, match="away"):
        waiting.pause()
    waiting.polled(waiting.due(), Polled({}, set(), {}, left=0.0))
    assert waiting.pause() >= 0, "while Redis answers, it says what has ended"


def test_before_the_first_look_the_caller_knows_the_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    waiting = Waiting(ids(1), None, expire_within=2)
    waiting.polled(waiting.due(), QueueUnavailable("Redis is away"))
    assert waiting.pause() >= 0
    now[0] += 10
    with pytest.raises(QueueUnavailable, match="away"):
        waiting.pause()


def test_a_look_at_some_of_the_jobs_does_not_shorten_the_wait_for_the_others() -> None:
    waiting = Waiting(ids(MAX_POLLED + 1), None, expire_within=600)
    waiting.polled(waiting.due(), Polled({}, set(), {}, left=1.0))
    assert waiting._last_deadline > time.monotonic() + 500


def test_jobs_whose_ends_are_told_are_polled_rarely() -> None:
    waiting = Waiting(ids(3), timeout=60)
    waiting.polled(waiting.due(3, time.monotonic() - 1), Polled({}, set(), {}, left=60.0))
    assert 4 < waiting.pause() <= 5
    waiting.notify(["job_1"])
    assert waiting.due(3, time.monotonic() - 1) == ["job_1"]


def test_jobs_that_were_polled_before_the_subscription_are_polled_once_more() -> None:
    """What ended in between was told to nobody."""
    waiting = Waiting(ids(3), timeout=60)
    waiting.polled(waiting.due(3), Polled({}, set(), {}, left=60.0))
    since = time.monotonic()
    assert waiting.due(3, since) == ids(3)
    waiting.polled(ids(3), Polled({}, set(), {}, left=60.0))
    assert waiting.due(3, since) == []
    assert 4 < waiting.pause() <= 5


def test_without_a_subscription_jobs_are_polled_soon() -> None:
    waiting = Waiting(ids(3), timeout=60)
    waiting.polled(waiting.due(3, time.monotonic() - 1), Polled({}, set(), {}, left=60.0))
    waiting._poll_at = 0.0
    waiting.polled(waiting.due(3, None), Polled({}, set(), {}, left=60.0))
    assert waiting.pause() < 0.2


def test_a_deadline_is_polled_for_though_nobody_tells_of_it() -> None:
    """Where no worker lives, a poll is what ends the job."""
    waiting = Waiting(ids(1), timeout=60)
    waiting.polled(waiting.due(1, time.monotonic() - 1), Polled({}, set(), {}, left=0.3))
    assert waiting.pause() <= 0.3
