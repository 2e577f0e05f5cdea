"""Polls of an event loop share round trips, and those of other cells wait for none."""

import asyncio

from blipq.client.coalescing import PollsOfCells
from blipq.ledger.codec import Polled
from blipq.redis.cells import id_in
from blipq.submission import new_id


class Trips:
    """Round trips that end when they are let go."""

    def __init__(self) -> None:
        self.made: list[list[str]] = []
        self.gate = asyncio.Event()
        self.held: set[str] = set()

    async def poll(self, ids: list[str]) -> Polled:
        self.made.append(ids)
        if self.held & set(ids):
            await self.gate.wait()
        return Polled({}, set(), {})


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_a_cell_that_does_not_answer_holds_up_no_polls_of_others() -> None:
    async def scenario() -> None:
        trips = Trips()
        polls = PollsOfCells(trips.poll, "ab")
        a, b = id_in(new_id(), "a"), id_in(new_id(), "b")
        trips.held = {b}
        hanging = asyncio.create_task(polls.poll([b]))
        await settled()
        for _ in range(3):
            await asyncio.wait_for(polls.poll([a]), 30)
        assert not hanging.done()
        closing = asyncio.create_task(polls.aclose())
        await settled()
        assert not closing.done()
        trips.gate.set()
        await asyncio.wait_for(asyncio.gather(hanging, closing), 30)

    asyncio.run(scenario())


def test_cells_that_are_not_named_share_the_polls_of_ids_that_say_none() -> None:
    async def scenario() -> None:
        trips = Trips()
        polls = PollsOfCells(trips.poll, "ab")
        ids = [id_in(new_id(), name) for name in "xyz"] + ["order-1"]
        trips.held = {ids[0]}
        asked = [asyncio.create_task(polls.poll([id])) for id in ids]
        await settled()
        trips.gate.set()
        await asyncio.wait_for(asyncio.gather(*asked), 30)
        assert trips.made == [ids]

    asyncio.run(scenario())


def test_with_one_redis_all_polls_share_one_round_trip_at_a_time() -> None:
    async def scenario() -> None:
        trips = Trips()
        polls = PollsOfCells(trips.poll, ())
        ids = [new_id(), id_in(new_id(), "a"), "order-1"]
        trips.held = {ids[0]}
        asked = [asyncio.create_task(polls.poll([ids[0]]))]
        await settled()
        asked += [asyncio.create_task(polls.poll([id])) for id in ids[1:]]
        await settled()
        assert trips.made == [ids[:1]]
        trips.gate.set()
        await asyncio.wait_for(asyncio.gather(*asked), 30)
        assert trips.made == [ids[:1], ids[1:]]

    asyncio.run(scenario())
