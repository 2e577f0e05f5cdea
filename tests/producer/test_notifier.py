"""Who waits is woken by a notification; without one, by the next look."""

from collections.abc import Iterator

import pytest
import redis

from blipq import Settings
from blipq.ledger import connect
from blipq.notifier import Notifier
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


def test_a_waiter_hears_of_its_job(notifier: Notifier, raw_redis: "redis.Redis") -> None:
    with notifier.watch("job_1", lambda: OWN) as told:
        tell(raw_redis, OWN, "job_1")
        assert told.wait(5)


def test_all_who_wait_for_a_job_hear_of_it(notifier: Notifier, raw_redis: "redis.Redis") -> None:
    with (
        notifier.watch("job_1", lambda: OWN) as first,
        notifier.watch("job_1", lambda: OWN) as second,
        notifier.watch("job_2", lambda: OWN) as other,
    ):
        tell(raw_redis, OWN, "job_1")
        assert first.wait(5)
        assert second.wait(5)
        assert not other.is_set()


def test_a_job_of_another_client_is_heard_of_on_its_channel(
    notifier: Notifier, raw_redis: "redis.Redis"
) -> None:
    with notifier.watch("job_1", lambda: FOREIGN) as told:
        tell(raw_redis, FOREIGN, "job_1")
        assert told.wait(5)


def test_a_dropped_connection_is_opened_again(notifier: Notifier, raw_redis: "redis.Redis") -> None:
    with notifier.watch("job_1", lambda: FOREIGN) as told:
        tell(raw_redis, FOREIGN, "job_0")
        raw_redis.client_kill_filter(_type="pubsub")
        tell(raw_redis, FOREIGN, "job_1")
        assert told.wait(5)


def test_nobody_is_remembered_after_the_wait(notifier: Notifier) -> None:
    with notifier.watch("job_1", lambda: OWN), notifier.watch("job_1", lambda: OWN):
        assert len(notifier._waiting["job_1"]) == 2
    assert notifier._waiting == {}


def test_a_client_that_never_waits_opens_no_subscription(
    notifier: Notifier, raw_redis: "redis.Redis"
) -> None:
    assert raw_redis.pubsub_numsub(OWN) == [(OWN, 0)]
