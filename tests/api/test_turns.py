"""Threads and large bodies: what one key holds of them, and what stays for others."""

import asyncio
import gc
import socket
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path

import pytest

from api.conftest import DoorProcess, Start
from api.test_keys import new_key
from blipq.local.sample import red_square
from blipq_api import turns
from blipq_api.problems import Problem
from blipq_api.turns import Turns, holder


def connected(door: DoorProcess) -> socket.socket:
    host, _, port = door.url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), 10)


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/v1/uploads", "image/png"), ("/v1/batches", "application/x-ndjson")],
)
def test_slow_large_bodies_of_a_key_hold_up_no_other_key(
    start: Start, tmp_path: Path, path: str, kind: str
) -> None:
    file = tmp_path / "keys.toml"
    slow, other = new_key(file, "slow"), new_key(file, "other")
    door = start(api_keys=str(file))
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n"
        f"Content-Type: {kind}\r\nAuthorization: Bearer {slow}\r\n\r\nx"
    )
    with ExitStack() as bodies, door.http(other) as http:
        for _ in range(8):
            bodies.enter_context(connected(door)).sendall(head.encode())
        for _ in range(3):
            answer = http.post(
                "/v1/uploads", content=red_square(), headers={"Content-Type": "image/png"}
            )
            assert answer.status_code == 201, answer.text


def test_a_key_has_half_of_the_turns_and_a_turn_that_ends_is_the_next_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(turns, "TURN_TIMEOUT_S", 0.1)

    async def run() -> None:
        some = Turns(4)
        async with AsyncExitStack() as held:
            holder.set("one")
            for _ in range(2):
                await held.enter_async_context(some.turn())
            with pytest.raises(Problem, match="busy") as refused:
                await held.enter_async_context(some.turn())
            assert (refused.value.status, refused.value.code) == (503, "busy")
            holder.set("two")
            for _ in range(2):
                await held.enter_async_context(some.turn())
            holder.set("three")
            with pytest.raises(Problem, match="busy"):
                await held.enter_async_context(some.turn())
        for name in ("one", "two", "three"):
            holder.set(name)
            async with some.turn(), some.turn():
                pass
        del refused  # whose frames hold what they waited for
        gc.collect()
        assert not some._of, "nothing is kept of keys that have no turn"

    asyncio.run(run())


def test_a_door_without_keys_has_one_user_who_may_have_all_turns() -> None:
    async def run() -> None:
        some = Turns(4)
        async with AsyncExitStack() as held:
            for _ in range(4):
                await held.enter_async_context(some.turn())

    asyncio.run(run())


def test_who_leaves_while_it_waits_holds_no_turn() -> None:
    async def wait(some: Turns) -> None:
        async with some.turn():
            raise AssertionError("there is none")

    async def run() -> None:
        some = Turns(2)
        holder.set("one")
        async with some.turn():
            waiting = asyncio.ensure_future(wait(some))
            await asyncio.sleep(0.05)
            waiting.cancel()
            await asyncio.wait([waiting])
            assert waiting.cancelled()
        async with some.turn():
            pass

    asyncio.run(run())
