"""Who waits in an event loop is woken by a notification, as one on a thread is."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import redis
import redis.asyncio

from blipq import Settings
from blipq.ledger.connection import connect_async
from blipq.transport.async_notifications import AsyncNotifier

OWN, FOREIGN = "blipq:ended:own", "blipq:ended:foreign"


@asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[AsyncNotifier]:
    notifier = AsyncNotifier(lambda: connect_async(settings, reconnects=False), OWN)
    try:
        yield notifier
    finally:
        await notifier.aclose()


async def until(condition: Callable[[], object], what: str) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.02)
    assert condition(), what


def listeners(raw: "redis.Redis", channel: str) -> int:
    return int(raw.pubsub_numsub(channel)[0][1])


def test_a_channel_asked_for_while_it_reads_is_heard_of_at_once(
    apart: Settings, raw_redis: "redis.Redis"
) -> None:
    async def scenario() -> None:
        async with opened(apart) as notifier, notifier.watch(["job_1"]) as inbox:
            await until(lambda: listeners(raw_redis, OWN), "the subscription")
            notifier.listen(inbox, [FOREIGN])
            await until(lambda: raw_redis.publish(FOREIGN, "job_1"), "the other channel")
            assert (await inbox.take(5))[0] == "job_1"

    asyncio.run(scenario())


def test_a_channel_is_left_by_the_last_who_needs_it(
    apart: Settings, raw_redis: "redis.Redis"
) -> None:
    async def scenario() -> None:
        async with opened(apart) as notifier:
            async with notifier.watch(["job_1"]) as inbox:
                notifier.listen(inbox, [FOREIGN])
                await until(lambda: listeners(raw_redis, FOREIGN) == 1, "the subscription")
            await until(lambda: listeners(raw_redis, FOREIGN) == 0, "its end")
            assert listeners(raw_redis, OWN) == 1

    asyncio.run(scenario())


def test_it_hears_on_through_dropped_connections_and_channels_that_come_and_go(
    apart: Settings, raw_redis: "redis.Redis", caplog: pytest.LogCaptureFixture
) -> None:
    """A subscribe met a connection that was being made again: the task ended, without a word."""

    async def come_and_go(notifier: AsyncNotifier, stop: asyncio.Event, name: str) -> None:
        while not stop.is_set():
            async with notifier.watch([name]) as inbox:
                notifier.listen(inbox, [f"blipq:ended:{name}"])
                await inbox.take(0.01)

    async def scenario() -> None:
        async with opened(apart) as notifier, notifier.watch(["job_1"]) as inbox:
            stop = asyncio.Event()
            tasks = [
                asyncio.create_task(come_and_go(notifier, stop, f"other{n}")) for n in range(10)
            ]
            for _ in range(30):
                await asyncio.to_thread(raw_redis.client_kill_filter, _type="pubsub")
                await asyncio.sleep(0.03)
            stop.set()
            await asyncio.gather(*tasks)
            await until(lambda: raw_redis.publish(OWN, "job_1"), "the subscription")
            told: list[str] = []
            while not told:  # the end of a subscription wakes it, too
                told = await inbox.take(5)
            assert told[0] == "job_1"

    with caplog.at_level(logging.WARNING, logger="blipq"):
        asyncio.run(scenario())
    assert not caplog.records


def test_an_outage_is_one_warning_and_one_line_at_its_end(
    apart: Settings,
    raw_redis: "redis.Redis",
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("blipq.transport.async_notifications.PAUSE_S", 0.01)
    attempts, away = [0], [True]

    def connecting() -> "redis.asyncio.Redis":
        attempts[0] += 1
        if away[0]:
            raise redis.ConnectionError("away")
        return connect_async(apart, reconnects=False)

    async def scenario() -> None:
        notifier = AsyncNotifier(connecting, OWN)
        async with notifier.watch(["job_1"]) as inbox:
            await until(lambda: attempts[0] > 20, "a long outage")
            away[0] = False
            await until(lambda: raw_redis.publish(OWN, "job_1"), "the subscription")
            assert (await inbox.take(5))[0] == "job_1"
        await notifier.aclose()

    with caplog.at_level(logging.INFO, logger="blipq"):
        asyncio.run(scenario())
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


def test_a_notification_that_is_no_text_does_not_end_it(
    apart: Settings, raw_redis: "redis.Redis"
) -> None:
    async def scenario() -> None:
        async with opened(apart) as notifier, notifier.watch(["job_1"]) as inbox:
            await until(lambda: raw_redis.publish(OWN, b"\xff\xfe"), "the subscription")
            async with asyncio.timeout(20):
                while not await inbox.take(0.2):
                    raw_redis.publish(OWN, "job_1")

    asyncio.run(scenario())
