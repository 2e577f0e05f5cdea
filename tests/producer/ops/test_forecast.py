"""The forecast of Redis' memory: its arithmetic, and what it makes of a real Redis."""

import json
import time

import pytest
import redis

from blipq import Client, Settings
from blipq.contract import CaptionRequest
from blipq.ledger import keys
from blipq.ledger.worker import Claim, WorkerLedger
from blipq.ops.doctor.redis import check_redis
from blipq.ops.forecast import DRAWN, FEWEST, Record, expected, forecast

DAY = 86400.0
GIB = 2**30
RESULT = json.dumps({"kind": "caption", "captions": [{"text": "a cat"}]})


def records(count: int, span_s: float, size: int = 1700) -> list[Record]:
    return [Record(size, span_s * (n + 1) / count, DAY) for n in range(count)]


def test_an_hour_of_a_days_jobs_grows_twentyfour_times() -> None:
    found = expected(records(DRAWN, 3600), total=1_332_000, used=3 * GIB, limit=64 * GIB)
    assert found is not None
    assert found.rate == pytest.approx(370)
    assert found.later == pytest.approx(3 * GIB + 23 * 1_332_000 * 1700)
    assert found.too_much


def test_a_full_retention_grows_no_more() -> None:
    found = expected(records(DRAWN, DAY), total=1_000_000, used=2 * GIB, limit=4 * GIB)
    assert found is not None
    assert found.later == pytest.approx(2 * GIB)
    assert not found.too_much


def test_keys_that_are_no_jobs_do_not_count_as_such() -> None:
    found = expected(records(DRAWN // 2, DAY), total=1_000_000, used=GIB, limit=0)
    assert found is not None
    assert found.rate == pytest.approx(500_000 / DAY)
    assert not found.too_much


@pytest.mark.parametrize(("count", "span_s"), [(0, 0), (FEWEST - 1, DAY), (DRAWN, 59)])
def test_too_little_says_nothing(count: int, span_s: float) -> None:
    assert expected(records(count, span_s), total=1000, used=GIB, limit=GIB) is None


def test_a_real_redis_is_sampled(
    client: Client, ledger: WorkerLedger, raw_redis: "redis.Redis", apart: Settings
) -> None:
    assert forecast(raw_redis) is None
    request = CaptionRequest.model_validate({"image": "s3://uploads/cat.jpg"})
    for n, job in enumerate(client.submit_many([request] * 50)):
        claim = ledger.claim(job.id, "w1")
        assert isinstance(claim, Claim)
        ledger.succeed(claim, RESULT, "{}")
        at = round((time.time() - 6 * n) * 1000)
        raw_redis.hset(keys.job(job.id), "completed_at", at)
    found = forecast(raw_redis)
    assert found is not None
    assert 300 < found.size < 3000
    assert found.kept_s == pytest.approx(DAY, rel=0.01)
    assert 0.1 < found.rate < 0.3
    (told,) = [each for each in check_redis(apart) if each.check == "redis forecast"]
    assert "jobs/s of" in told.message
