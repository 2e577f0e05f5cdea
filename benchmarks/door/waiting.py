"""What clients that wait for jobs take: the door's memory, and subscriptions at Redis."""

import asyncio
from typing import Any

import psutil

from benchmarks.clients import finish_all
from benchmarks.door import Measured, running
from blipq import Client
from blipq.ledger.connection import connect

CLIENTS, JOBS = 2_000, 100
AT_ONCE = 100
SETTLED_S = 5.0


def waiting() -> dict[str, float]:
    """Memory and subscriptions while so many wait, and whether all are answered."""
    with running() as measured:
        with Client(measured.settings) as client:
            ids = [client.caption(f"s3://photos/{n}.jpg").id for n in range(JOBS)]
        with measured.http() as http:
            http.get(f"/v1/jobs/{ids[0]}?wait=1")
        return asyncio.run(_measured(measured, ids))


async def _measured(measured: Measured, ids: list[str]) -> dict[str, float]:
    assert measured.service.pid is not None
    process = psutil.Process(measured.service.pid)
    before = process.memory_info().rss
    connections = len(process.net_connections())
    room = asyncio.Semaphore(AT_ONCE)
    waits = asyncio.gather(*(_wait(measured, ids[n % JOBS], room) for n in range(CLIENTS)))
    while len(process.net_connections()) < connections + CLIENTS:
        await asyncio.sleep(0.2)
    await asyncio.sleep(SETTLED_S)
    grown = (process.memory_info().rss - before) / 2**20
    with connect(measured.settings) as raw:
        subscribed: Any = raw.client_list(_type="pubsub")
    await asyncio.to_thread(finish_all, measured.settings, ids)
    answered = await waits
    return {
        "clients": CLIENTS,
        "mib": grown,
        "subscriptions": len(subscribed),
        "answered": sum(answered),
    }


async def _wait(measured: Measured, id: str, room: asyncio.Semaphore) -> bool:
    async with room:
        reader, writer = await asyncio.open_connection(*measured.host)
        writer.write(f"GET /v1/jobs/{id}?wait=60 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        await writer.drain()
    status = await reader.readline()
    writer.close()
    return b" 200 " in status
