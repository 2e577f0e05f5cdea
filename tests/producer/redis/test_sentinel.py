"""sentinel:// URLs, for the ledger and for Celery. A real failover is in tests/guarantees."""

import time

import pytest

from blipq.errors import InvalidRequest, QueueUnavailable
from blipq.ledger.connection import connect
from blipq.ledger.worker import WorkerLedger
from blipq.local.stack import free_port
from blipq.redis.url import RedisUrl
from blipq.settings import Settings
from blipq.submission import checked
from blipq.transport.broker import broker_address

URL = "sentinel://app:p%40ss@one:26380,two/3?master=jobs&sentinel_password=other"


def test_a_url_names_sentinels_master_database_and_passwords() -> None:
    assert RedisUrl.of(URL) == RedisUrl(
        scheme="sentinel",
        hosts=(("one", 26380), ("two", 26379)),
        master="jobs",
        database=3,
        username="app",
        password="p@ss",
        sentinel_password="other",
    )


def test_a_plain_url_has_the_usual_master() -> None:
    url = RedisUrl.of("sentinel://one")
    assert (url.hosts, url.master, url.database) == ((("one", 26379),), "mymaster", 0)


def test_celery_gets_the_url_in_its_own_form() -> None:
    address = broker_address(Settings(redis_url=URL))
    options = address.options
    assert address.url == "sentinel://app:p%40ss@one:26380/3;sentinel://app:p%40ss@two:26379/3"
    assert options["master_name"] == "jobs"
    assert options["sentinel_kwargs"]["password"] == "other"
    assert options["ack_emulation"] is False


@pytest.mark.parametrize("url", ["sentinel://", "sentinel://one/first", "sentinel://one:port"])
def test_a_url_that_names_nothing_is_told_at_once(url: str) -> None:
    with pytest.raises(InvalidRequest, match="redis_url"):
        checked(Settings, redis_url=url)


def test_sentinels_that_do_not_answer_cost_no_longer_than_the_timeout() -> None:
    url = f"sentinel://127.0.0.1:{free_port()},127.0.0.1:{free_port()}"
    settings = Settings(redis_url=url, timeout_s=1)
    started = time.monotonic()
    with connect(settings) as client, pytest.raises(QueueUnavailable, match="No master"):
        WorkerLedger(client, settings).read("job_x")
    assert time.monotonic() - started < 10
