"""Thousands of clients that wait at one door: what they take of it, and of Redis."""

import asyncio
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import pytest
import redis

from api.conftest import DoorProcess, Start
from api.test_jobs import submitted
from blipq.ledger.worker import WorkerLedger
from blipq_api.server import allow_files

RESULT = '{"kind": "caption", "captions": [{"text": "a cat"}]}'
WAITING = 2_000
#: Connections are made so many at a time.
AT_ONCE = 100


@contextmanager
def files(soft: int) -> Iterator[None]:
    """Lets this process, and those that it starts, open so many files at first."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def rss_mib(pid: int) -> float:
    return float(psutil.Process(pid).memory_info().rss / 2**20)


async def waits(door: DoorProcess, ids: list[str], count: int, answers: list[bytes]) -> None:
    """Waits for jobs on a connection of its own each; ``answers`` has the heads of what came."""
    host, _, port = door.url.removeprefix("http://").partition(":")
    room = asyncio.Semaphore(AT_ONCE)

    async def wait(n: int) -> None:
        async with room:
            reader, writer = await asyncio.open_connection(host, int(port))
            path = f"/v1/jobs/{ids[n % len(ids)]}?wait=60"
            writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            await writer.drain()
        async with asyncio.timeout(90):
            answers.append(await reader.readline())
        writer.close()

    await asyncio.gather(*map(wait, range(count)))


def subscribed(raw: "redis.Redis") -> dict[str, int]:
    """Clients of Redis that hear of ended jobs, by channel."""
    channels: Any = raw.pubsub_channels("blipq:ended:*")
    counts: Any = raw.pubsub_numsub(*channels)
    return {str(name): int(count) for name, count in counts}


def test_two_thousand_waiting_clients_take_little_memory_and_one_subscription(
    start: Start, raw_redis: "redis.Redis", ledger: WorkerLedger
) -> None:
    with files(resource.getrlimit(resource.RLIMIT_NOFILE)[1]):
        door = start()
        assert door.service.pid is not None
        process = psutil.Process(door.service.pid)
        with door.http() as http:
            ids = [submitted(http) for _ in range(20)]
            http.get(f"/v1/jobs/{ids[0]}?wait=1")
        before, connections = rss_mib(door.service.pid), len(process.net_connections())
        others = subscribed(raw_redis)
        answers: list[bytes] = []

        async def run() -> tuple[float, dict[str, int]]:
            waiting = asyncio.ensure_future(waits(door, ids, WAITING, answers))
            while len(process.net_connections()) < connections + WAITING:
                await asyncio.sleep(0.2)
                assert not waiting.done()
            await asyncio.sleep(2)  # the last ones' requests are read
            found = rss_mib(process.pid), subscribed(raw_redis)
            for id in ids:
                await asyncio.to_thread(end, ledger, id)
            await waiting
            return found

        async def bounded() -> tuple[float, dict[str, int]]:
            async with asyncio.timeout(100):
                return await run()

        memory, channels = asyncio.run(bounded())
        assert answers == [b"HTTP/1.1 200 OK\r\n"] * WAITING
        assert memory - before < 200
        assert sum(channels.values()) - sum(others.values()) <= 1


def end(ledger: WorkerLedger, id: str) -> None:
    claim: Any = ledger.claim(id, "w1")
    assert ledger.succeed(claim, RESULT, "{}")


def test_a_door_that_may_open_few_files_at_first_lets_itself_have_more(
    start: Start, ledger: WorkerLedger
) -> None:
    count = 300
    door = start(files=128)
    with files(resource.getrlimit(resource.RLIMIT_NOFILE)[1]), door.http() as http:
        id = submitted(http)
        answers: list[bytes] = []

        async def run() -> None:
            waiting = asyncio.ensure_future(waits(door, [id], count, answers))
            assert door.service.pid is not None
            process = psutil.Process(door.service.pid)
            async with asyncio.timeout(30):
                while len(process.net_connections()) < count:
                    await asyncio.sleep(0.1)
            assert (await asyncio.to_thread(http.get, "/health")).status_code == 200
            await asyncio.to_thread(end, ledger, id)
            await waiting

        asyncio.run(run())
    assert answers == [b"HTTP/1.1 200 OK\r\n"] * count


def test_a_door_whose_system_lets_it_have_too_few_files_says_what_to_do(
    caplog: pytest.LogCaptureFixture,
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with files(soft):
        allow_files(hard + 1)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    assert f"may open {hard} files" in caplog.text
    assert "ulimit -n" in caplog.text
