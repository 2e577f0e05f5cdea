"""Who waits is woken by a notification; without one, by the next look."""

import logging
import threading
import time
from collections.abc import Iterator

import pytest
import redis

from blipq import Client, Settings
from blipq.ledger.connection import connect
from blipq.transport.notifications import Notifier, Outage
from conftest import wait_until

OWN, FOREIGN = "blipq:ended:own", "blipq:ended:foreign"


@pytest.fixture
def notifier(apart: Settings) -> Iterator[Notifier]:
    notifier = Notifier(lambda: connect(apart), OWN)
    yield notifier
    notifier.close()


def tell(raw: "redis.Redis", channel: str, id: str) -> None:
    """Publishes until somebody listens."""
    wait_until(lambda: raw.publish(channel, id) > 0, "a subscription")


def test_a_waiter_hears_of_its_jobs(notifier: Notifier, raw_redis: "redis.Redis") -> None:
    with notifier.watch(["job_1", "job_2"]) as inbox:
        tell(raw_redis, OWN, "job_1")
        assert inbox.take(5) == ["job_1"]
        tell(raw_redis, OWN, "job_2")
        assert inbox.take(5) == ["job_2"]


def no_thread(self: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_a_thread_that_cannot_be_started_is_tried_again_by_the_next_who_waits(
    notifier: Notifier,
    raw_redis: "redis.Redis",
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with monkeypatch.context() as full, caplog.at_level(logging.WARNING, logger="blipq"):
        full.setattr(threading.Thread, "start", no_thread)
        with notifier.watch(["job_1"]) as inbox:
            assert inbox.take(0) == []
    assert "can't start new thread" in caplog.text
    assert len(notifier) == 0
    with notifier.watch(["job_2"]) as inbox:
        tell(raw_redis, OWN, "job_2")
        assert inbox.take(5) == ["job_2"]


class Away:
    """A Redis that can be away."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.error: Exception | None = None
        self.attempts = 0

    def connect(self) -> "redis.Redis":
        self.attempts += 1
        if self.error is not None:
            raise self.error
        return connect(self._settings)


@pytest.mark.parametrize("error", [redis.ConnectionError("away"), ValueError("broken")])
def test_an_outage_is_one_warning_and_one_line_at_its_end(
    apart: Settings,
    raw_redis: "redis.Redis",
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    monkeypatch.setattr("blipq.transport.notifications.PAUSE_S", 0.01)
    away = Away(apart)
    away.error = error
    notifier = Notifier(away.connect, OWN)
    with caplog.at_level(logging.INFO, logger="blipq"), notifier.watch(["job_1"]) as inbox:
        wait_until(lambda: away.attempts > 20, "a long outage")
        away.error = None
        tell(raw_redis, OWN, "job_1")
        assert inbox.take(5) == ["job_1"]
    notifier.close()
    first, last = caplog.records
    assert (first.levelname, last.levelname) == ("WARNING", "INFO")
    assert str(error) in first.getMessage()
    assert "received again" in last.getMessage()


def test_outages_that_follow_each_other_are_told_once_a_minute(
    caplog: pytest.LogCaptureFixture,
) -> None:
    outage = Outage()
    with caplog.at_level(logging.INFO, logger="blipq"):
        for _ in range(20):
            outage.failed(ValueError("no text"))
            outage.over()
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


def test_a_client_without_a_thread_waits_all_the_same_and_closes(
    apart: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Client(apart) as client:
        job = client.caption("s3://uploads/cat.jpg")
        job.cancel()
        monkeypatch.setattr(threading.Thread, "start", no_thread)
        assert job.wait(10).status == "cancelled"


def test_all_who_wait_for_a_job_hear_of_it(notifier: Notifier, raw_redis: "redis.Redis") -> None:
    with (
        notifier.watch(["job_1"]) as first,
        notifier.watch(["job_1"]) as second,
        notifier.watch(["job_2"]) as other,
    ):
        tell(raw_redis, OWN, "job_1")
        assert first.take(5) == ["job_1"]
        assert second.take(5) == ["job_1"]
        assert other.take(0) == []


def test_a_job_of_another_client_is_heard_of_on_its_channel(
    notifier: Notifier, raw_redis: "redis.Redis"
) -> None:
    with notifier.watch(["job_1"]) as inbox:
        tell(raw_redis, OWN, "job_0")
        notifier.listen(inbox, [FOREIGN])
        tell(raw_redis, FOREIGN, "job_1")
        assert inbox.take(5) == ["job_1"]


def test_another_clients_channel_is_left_by_the_last_who_needs_it(
    notifier: Notifier, raw_redis: "redis.Redis"
) -> None:
    with notifier.watch(["job_1"]) as first:
        notifier.listen(first, [FOREIGN])
        with notifier.watch(["job_2"]) as second:
            notifier.listen(second, [FOREIGN, FOREIGN])
            wait_until(lambda: listeners(raw_redis, FOREIGN) == 1, "the subscription")
        raw_redis.publish(FOREIGN, "job_1")
        assert first.take(5) == ["job_1"]
    wait_until(lambda: listeners(raw_redis, FOREIGN) == 0, "its end")
    assert listeners(raw_redis, OWN) == 1


def listeners(raw: "redis.Redis", channel: str) -> int:
    return int(raw.pubsub_numsub(channel)[0][1])


def test_a_dropped_connection_is_opened_again(notifier: Notifier, raw_redis: "redis.Redis") -> None:
    with notifier.watch(["job_1"]) as inbox:
        notifier.listen(inbox, [FOREIGN])
        tell(raw_redis, FOREIGN, "job_0")
        raw_redis.client_kill_filter(_type="pubsub")
        tell(raw_redis, FOREIGN, "job_1")
        wait_until(lambda: inbox.take(5) == ["job_1"], "the job")  # the drop itself wakes it, too


def test_who_waits_knows_since_when_all_channels_are_heard(
    notifier: Notifier, raw_redis: "redis.Redis"
) -> None:
    with notifier.watch(["job_1"]) as inbox:
        assert notifier.subscribed_since(inbox) is None
        wait_until(lambda: notifier.subscribed_since(inbox), "the subscription")
        first = notifier.subscribed_since(inbox)
        notifier.listen(inbox, [FOREIGN])
        assert notifier.subscribed_since(inbox) is None
        wait_until(lambda: notifier.subscribed_since(inbox), "the other channel")
        assert notifier.subscribed_since(inbox) > first


def test_a_dropped_connection_wakes_who_waits_and_counts_anew(
    notifier: Notifier, raw_redis: "redis.Redis"
) -> None:
    """What ended meanwhile was told to nobody: it is polled for at once."""
    with notifier.watch(["job_1"]) as inbox:
        wait_until(lambda: notifier.subscribed_since(inbox), "the subscription")
        before = time.monotonic()
        raw_redis.client_kill_filter(_type="pubsub")
        assert inbox.take(30) == []
        assert time.monotonic() < before + 20
        wait_until(lambda: (notifier.subscribed_since(inbox) or 0) > before, "another subscription")


def test_nobody_is_remembered_after_the_wait(notifier: Notifier) -> None:
    with notifier.watch(["job_1", "job_2"]), notifier.watch(["job_1"]):
        assert len(notifier) == 2
    assert len(notifier) == 0


def test_a_client_that_never_waits_opens_no_subscription(
    notifier: Notifier, raw_redis: "redis.Redis"
) -> None:
    assert listeners(raw_redis, OWN) == 0


def test_it_hears_on_through_dropped_connections_and_channels_that_come_and_go(
    notifier: Notifier, raw_redis: "redis.Redis", caplog: pytest.LogCaptureFixture
) -> None:
    """A subscribe met a connection that was being made again: the thread died, without a word."""
    stop = threading.Event()

    def come_and_go(name: str) -> None:
        while not stop.is_set():
            with notifier.watch([name]) as inbox:
                notifier.listen(inbox, [f"blipq:ended:{name}"])
                inbox.take(0.01)

    threads = [threading.Thread(target=come_and_go, args=(f"other{n}",)) for n in range(6)]
    with caplog.at_level(logging.WARNING, logger="blipq"), notifier.watch(["job_1"]) as inbox:
        for thread in threads:
            thread.start()
        for _ in range(30):
            raw_redis.client_kill_filter(_type="pubsub")
            stop.wait(0.03)
        stop.set()
        for thread in threads:
            thread.join()
        tell(raw_redis, OWN, "job_1")
        wait_until(lambda: "job_1" in inbox.take(5), "the job")  # the drops wake it, too
    assert not caplog.records


def test_a_notification_that_is_no_text_does_not_end_it(
    notifier: Notifier, raw_redis: "redis.Redis"
) -> None:
    with notifier.watch(["job_1"]) as inbox:
        wait_until(lambda: raw_redis.publish(OWN, b"\xff\xfe"), "the subscription")
        wait_until(lambda: raw_redis.publish(OWN, "job_1") and inbox.take(0.2), "the next one")
