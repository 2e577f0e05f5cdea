"""Redis goes away under clients that submit and await many jobs."""

import asyncio
import threading
import time
from collections.abc import Iterator

from blipq import AsyncClient, CaptionRequest, Status
from blipq.client.submitting import MAX_JOBS
from guarantees.rig import Rig

COUNT = 3 * MAX_JOBS
AWAY_S = 5.0


def with_an_outage(rig: Rig) -> Iterator[CaptionRequest]:
    """Requests, while Redis dies in the middle and comes back."""

    def come_back() -> None:
        time.sleep(AWAY_S)
        rig.start_redis()
        time.sleep(300)  # the server ends with the thread that started it

    for number in range(COUNT):
        if number == MAX_JOBS + MAX_JOBS // 2:
            rig.kill_redis()
            threading.Thread(target=come_back, daemon=True).start()
        yield CaptionRequest(image=rig.image, prompt=f"job {number}")


def recorded(rig: Rig) -> int:
    return rig.redis(lambda raw: sum(1 for _ in raw.scan_iter("blipq:job:*", count=1000)))


def test_many_are_submitted_once_each_through_an_outage_of_redis(rig: Rig) -> None:
    rig.start_worker()
    jobs = rig.client.submit_many(with_an_outage(rig), timeout=60)
    ended = rig.client.wait_all(jobs, timeout=120)
    assert {job.status() for job in ended} == {Status.SUCCEEDED}
    texts = [job.result().text for job in ended]
    assert texts == [f"did job {number}" for number in range(COUNT)]
    assert recorded(rig) == COUNT


def test_an_event_loop_submits_and_awaits_many_through_an_outage_of_redis(rig: Rig) -> None:
    rig.start_worker()

    async def main() -> list[str]:
        async with AsyncClient(rig.settings) as client:
            jobs = await client.submit_many(with_an_outage(rig), timeout=60)
            results = await asyncio.gather(*[job.result(timeout=120) for job in jobs])
            return [result.text for result in results]

    assert asyncio.run(main()) == [f"did job {number}" for number in range(COUNT)]
    assert recorded(rig) == COUNT


def test_waits_for_many_outlive_an_outage_of_redis(rig: Rig) -> None:
    jobs = rig.client.submit_many(
        CaptionRequest(image=rig.image, prompt=f"job {number}") for number in range(100)
    )
    ended: list[str] = []
    waiting = threading.Thread(
        target=lambda: ended.extend(job.id for job in rig.client.as_completed(jobs, timeout=120))
    )
    waiting.start()
    rig.kill_redis()
    time.sleep(AWAY_S)
    rig.start_redis()
    rig.start_worker()
    waiting.join()
    assert set(ended) == {job.id for job in jobs}
