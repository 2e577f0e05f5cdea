"""What only an event loop can show: nothing blocks it, and cancelling harms nobody."""

import asyncio
import threading
import time
from typing import Any

import pytest
import redis
import redis.asyncio

from blipq import AsyncClient, CaptionRequest, JobNotFound, QueueUnavailable, Settings
from blipq.ledger.keys import ended_channel
from blipq.ledger.worker import Claim, WorkerLedger
from blipq.testing import FakeBlipq

IMAGE = "s3://uploads/cat.jpg"
RESULT = '{"kind": "caption", "captions": [{"text": "a cat"}]}'


def finish(ledger: WorkerLedger, id: str) -> None:
    claim = ledger.claim(id, "w1")
    assert isinstance(claim, Claim)
    assert ledger.succeed(claim, RESULT, "{}")


def asked(number: int) -> CaptionRequest:
    return CaptionRequest.model_validate({"image": f"s3://uploads/{number}.jpg"})


async def until(condition: Any, what: str, timeout: float = 30.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout:g} s for {what}"
        await asyncio.sleep(0.02)


def test_a_thousand_waits_share_one_subscription_and_few_looks(
    apart: Settings, ledger: WorkerLedger, raw_redis: "redis.Redis"
) -> None:
    async def main() -> list[str]:
        async with AsyncClient(apart) as client:
            jobs = await client.submit_many(map(asked, range(1000)))
            waits = asyncio.gather(*[job.result(timeout=60) for job in jobs])
            await until(lambda: len(client.notifier) == 1000, "the waits")
            await until(lambda: raw_redis.pubsub_channels("blipq:ended:*"), "the subscription")
            assert len(raw_redis.pubsub_channels("blipq:ended:*")) == 1
            raw_redis.config_resetstat()
            await asyncio.to_thread(lambda: [finish(ledger, job.id) for job in jobs])
            told = [result.text for result in await waits]
            assert len(client.notifier) == 0
            return told

    assert asyncio.run(main()) == ["a cat"] * 1000
    calls = raw_redis.info("commandstats")["cmdstat_evalsha"]["calls"]
    assert calls < 2000 + 1000, "claims and finishes, and fewer looks than jobs"
    assert raw_redis.info("clients")["maxclients"] > 100


def test_many_submits_at_once_are_all_published(apart: Settings, raw_redis: "redis.Redis") -> None:
    async def main() -> None:
        async with AsyncClient(apart) as client:
            await asyncio.gather(*[client.caption(f"s3://uploads/{n}.jpg") for n in range(200)])

    asyncio.run(main())
    assert raw_redis.llen("blipq.default.normal") == 200


def test_a_connection_that_takes_its_time_to_close_is_closed(
    apart: Settings, raw_redis: "redis.Redis", monkeypatch: pytest.MonkeyPatch
) -> None:
    disconnect = redis.asyncio.Connection.disconnect

    begun: list[Any] = []
    closed: list[Any] = []

    async def slowly(self: Any, nowait: bool = False) -> None:
        begun.append(self)
        await asyncio.sleep(0.8)
        await disconnect(self, nowait)
        closed.append(self)

    async def main() -> None:
        async with AsyncClient(apart) as client:
            channel = ended_channel(client._id)
            job = await client.submit(asked(1))
            wait = asyncio.create_task(job.result(timeout=60))
            await until(lambda: raw_redis.pubsub_numsub(channel)[0][1], "the subscription")
            wait.cancel()
            await asyncio.wait([wait])
            monkeypatch.setattr(redis.asyncio.Connection, "disconnect", slowly)

    asyncio.run(main())
    assert begun
    assert closed == begun, "what closed a connection was cancelled"


def test_a_cancelled_wait_leaves_nothing_behind_and_disturbs_nobody(
    apart: Settings, ledger: WorkerLedger
) -> None:
    async def main() -> None:
        async with AsyncClient(apart) as client:
            first, second = await client.submit_many([asked(1), asked(2)])
            left = asyncio.create_task(first.result(timeout=60))
            stays = asyncio.create_task(second.result(timeout=60))
            await until(lambda: len(client.notifier) == 2, "the waits")
            left.cancel()
            with pytest.raises(asyncio.CancelledError):
                await left
            assert len(client.notifier) == 1
            finish(ledger, second.id)
            assert (await stays).text == "a cat"

    asyncio.run(main())


def test_a_cancelled_submit_can_be_repeated(apart: Settings, raw_redis: "redis.Redis") -> None:
    async def main() -> None:
        async with AsyncClient(apart) as client:
            for pause in (0, 0.0005, 0.002, 0.005):
                submit = client.caption(IMAGE, idempotency_key="order-42")
                task = asyncio.create_task(submit)
                await asyncio.sleep(pause)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            job = await client.caption(IMAGE, idempotency_key="order-42")
            assert await job.status() == "queued"

    asyncio.run(main())
    assert raw_redis.zcard("blipq:open") == 1


def test_requests_may_come_from_an_asynchronous_generator(apart: Settings) -> None:
    async def requests() -> Any:
        for number in range(3):
            await asyncio.sleep(0)
            yield asked(number)

    async def main() -> int:
        async with AsyncClient(apart) as client:
            return len(await client.submit_many(requests()))

    assert asyncio.run(main()) == 3


def test_a_dropped_connection_only_delays(
    apart: Settings, ledger: WorkerLedger, raw_redis: "redis.Redis"
) -> None:
    async def main() -> str:
        async with AsyncClient(apart) as client:
            job = await client.caption(IMAGE)
            wait = asyncio.create_task(job.result(timeout=60))
            await until(lambda: raw_redis.pubsub_channels("blipq:ended:*"), "the subscription")
            raw_redis.client_kill_filter(_type="pubsub")
            raw_redis.client_kill_filter(_type="normal", skipme=True)
            finish(ledger, job.id)
            return (await wait).text

    assert asyncio.run(main()) == "a cat"


def test_redis_away_is_told_in_time_and_the_loop_goes_on() -> None:
    async def main() -> int:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.01)
                ticks += 1

        ticking = asyncio.create_task(tick())
        async with AsyncClient(redis_url="redis://127.0.0.1:1/0") as client:
            with pytest.raises(QueueUnavailable, match="Redis does not answer") as raised:
                await client.caption(IMAGE)
            assert raised.value.job_id
            with pytest.raises(QueueUnavailable):
                await client.job("job_1").wait(timeout=0.3)
        ticking.cancel()
        return ticks

    assert asyncio.run(main()) > 5


def test_a_publish_that_hangs_does_not_hold_the_loop_up(apart: Settings) -> None:
    settings = apart.model_copy(update={"broker_url": "redis://127.0.0.1:1/0"})

    async def main() -> str:
        async with AsyncClient(settings) as client:
            job = await client.caption(IMAGE)
            return await job.status()

    assert asyncio.run(main()) == "queued"


def test_a_client_that_was_never_used_closes(apart: Settings) -> None:
    async def main() -> None:
        async with AsyncClient(apart):
            pass

    asyncio.run(main())
    assert threading.active_count() < 50


def test_one_who_left_early_leaves_the_rest_alone() -> None:
    fake = FakeBlipq()
    fake.stop_worker()

    async def main() -> None:
        async with AsyncClient(backend=fake) as client:
            jobs = await client.submit_many(map(asked, range(3)))
            await jobs[0].cancel()
            async for job in client.as_completed(jobs, timeout=10):
                assert job == jobs[0]
                break
            with pytest.raises(JobNotFound):
                await client.job("job_unknown").result()

    asyncio.run(main())
