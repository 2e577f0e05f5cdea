"""Scripts that threads run at the same time, in one round trip."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import redis

from blipq.errors import QueueUnavailable
from blipq.ledger.connection import connect
from blipq.ledger.scripts.combining import MOST, Combined
from blipq.ledger.worker import WorkerLedger
from blipq.settings import Settings
from conftest import wait_until

ECHO = "return ARGV[1]"
FAILING = "return redis.error_reply('ERR ' .. ARGV[1])"


class Counting:
    """A client that counts its round trips and holds the first of them up."""

    def __init__(self, client: "redis.Redis") -> None:
        self._client = client
        self.trips = 0
        self.going_on = threading.Event()

    def pipeline(self) -> Any:
        self.trips += 1
        if self.trips == 1:
            assert self.going_on.wait(30)
        return self._client.pipeline(transaction=False)


@pytest.fixture
def counting(raw_redis: "redis.Redis") -> Iterator[Counting]:
    counting = Counting(raw_redis)
    yield counting
    counting.going_on.set()


def at_once(
    counting: Counting, combined: Combined, count: int, call: Callable[[int], Any]
) -> list[Any]:
    """The first call is under way while the others come; what each of them came to."""
    with ThreadPoolExecutor(count) as threads:
        first = threads.submit(call, 0)
        wait_until(lambda: counting.trips == 1, "the first round trip")
        others = [threads.submit(call, number) for number in range(1, count)]
        wait_until(lambda: len(combined._waiting) == count - 1, "the others to wait")
        counting.going_on.set()
        return [each.exception() or each.result() for each in [first, *others]]


def test_calls_that_come_while_one_is_under_way_share_the_next_round_trip(
    counting: Counting, raw_redis: "redis.Redis"
) -> None:
    combined, sha = Combined(counting.pipeline), raw_redis.script_load(ECHO)
    answers = at_once(counting, combined, 20, lambda number: combined(sha, [f"call {number}"]))
    assert answers == [f"call {number}" for number in range(20)]
    assert counting.trips == 2


def test_more_calls_than_fit_take_further_round_trips(
    counting: Counting, raw_redis: "redis.Redis"
) -> None:
    combined, sha = Combined(counting.pipeline), raw_redis.script_load(ECHO)
    count = 2 * MOST + 2
    answers = at_once(counting, combined, count, lambda number: combined(sha, [str(number)]))
    assert answers == [str(number) for number in range(count)]
    assert counting.trips == 4


def test_an_error_is_that_of_its_call_alone(counting: Counting, raw_redis: "redis.Redis") -> None:
    combined = Combined(counting.pipeline)
    scripts = [raw_redis.script_load(ECHO), raw_redis.script_load(FAILING)]
    answers = at_once(
        counting, combined, 6, lambda number: combined(scripts[number % 2], [str(number)])
    )
    assert [str(answer) for answer in answers] == [str(number) for number in range(6)]
    assert [isinstance(each, redis.ResponseError) for each in answers] == [False, True] * 3


def test_what_meets_no_redis_raises_in_every_thread_and_the_next_call_goes_on(
    counting: Counting, raw_redis: "redis.Redis", monkeypatch: pytest.MonkeyPatch
) -> None:
    combined, sha = Combined(counting.pipeline), raw_redis.script_load(ECHO)

    def away(**options: Any) -> Any:
        raise redis.ConnectionError("away")

    counting.going_on.set()
    with monkeypatch.context() as broken:
        broken.setattr(counting._client, "pipeline", away)
        with pytest.raises(redis.ConnectionError):
            combined(sha, ["x"])
    assert combined(sha, ["y"]) == "y"


def test_a_claim_goes_on_where_redis_has_lost_the_script(
    ledger: WorkerLedger, raw_redis: "redis.Redis"
) -> None:
    assert ledger.claim("job_unknown", "w1") == "unknown"
    raw_redis.script_flush()
    assert ledger.claim("job_unknown", "w1") == "unknown"


def test_claims_of_many_threads_that_meet_no_redis_are_over_in_time(apart: Settings) -> None:
    gone = apart.model_copy(update={"redis_url": "redis://127.0.0.1:1/0", "timeout_s": 1.0})
    started = time.monotonic()
    with connect(gone) as client, ThreadPoolExecutor(16) as threads:
        ledger = WorkerLedger(client, gone)
        claims = [threads.submit(ledger.claim, f"job_{number}", "w1") for number in range(16)]
        errors = [claim.exception() for claim in claims]
    assert {type(error) for error in errors} == {QueueUnavailable}
    assert time.monotonic() - started < 20
