"""Heads of requests that are too large, or too slow: the connection ends, and nothing else."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from blipq.api import server
from blipq.api.server import MOST_HEADER_BYTES, BoundedProtocol

HEAD = b"POST / HTTP/1.1\r\nHost: localhost\r\n"
OPTIONS: dict[str, Any] = {"ws": "none", "lifespan": "off", "log_config": None, "access_log": False}

Conversation = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the number of bytes of the body."""
    size, more = 0, True
    while more:
        message = await receive()
        size += len(message.get("body", b""))
        more = message.get("more_body", False)
    length = (b"content-length", str(len(str(size))).encode())
    await send({"type": "http.response.start", "status": 200, "headers": [length]})
    await send({"type": "http.response.body", "body": str(size).encode()})


def converse(conversation: Conversation) -> None:
    """Serves one connection, in this process."""
    config = uvicorn.Config(app, http=BoundedProtocol, **OPTIONS)
    config.load()

    def protocol() -> BoundedProtocol:
        return BoundedProtocol(config=config, server_state=ServerState(), app_state={})

    async def run() -> None:
        listening = await asyncio.get_running_loop().create_server(protocol, "127.0.0.1", 0)
        async with listening, asyncio.timeout(30):
            reader, writer = await asyncio.open_connection(*listening.sockets[0].getsockname())
            try:
                await conversation(reader, writer)
            finally:
                writer.close()

    asyncio.run(run())


async def answer(reader: asyncio.StreamReader) -> str:
    """The body of one answer, which is on the line behind its head."""
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), head
    length = next(
        line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")
    )
    return (await reader.readexactly(int(length.partition(b":")[2]))).decode()


async def ends(reader: asyncio.StreamReader) -> bool:
    """Whether the connection ends, and without an answer."""
    try:
        return await reader.read() == b""
    except ConnectionResetError:
        return True


async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Sends a byte now and then, until it may not."""
    while not reader.at_eof():
        writer.write(b"x")
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("size", [1000, MOST_HEADER_BYTES])
def test_a_head_that_never_ends_is_cut_off(size: int) -> None:
    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD)
        for number in range(2 * MOST_HEADER_BYTES // size):
            writer.write(b"X-%d: %s\r\n" % (number, b"x" * size))
        assert await ends(reader)

    converse(conversation)


def test_a_body_is_no_part_of_the_head_however_it_comes() -> None:
    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        size = 3 * MOST_HEADER_BYTES
        for _ in range(2):  # on one connection
            writer.write(HEAD + b"Content-Length: %d\r\n\r\n" % size)
            for _ in range(3):
                writer.write(b"x" * MOST_HEADER_BYTES)
                await writer.drain()
            assert await answer(reader) == str(size)

    converse(conversation)


def test_a_head_that_is_too_slow_is_given_up_also_behind_another_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server, "HEADER_TIMEOUT_S", 0.3)

    async def first(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + b"X: ")
        sending = asyncio.ensure_future(slow(reader, writer))
        assert await ends(reader)
        sending.cancel()

    async def second(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + b"Content-Length: 0\r\n\r\n")
        assert await answer(reader) == "0"
        await first(reader, writer)

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await ends(reader)

    for conversation in (first, second, silent):
        converse(conversation)


def test_a_slow_body_and_a_pause_between_requests_are_not_a_slow_head(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server, "HEADER_TIMEOUT_S", 0.2)

    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(2):
            writer.write(HEAD + b"Content-Length: 2\r\n\r\nx")
            await asyncio.sleep(0.5)
            writer.write(b"x")
            assert await answer(reader) == "2"
            await asyncio.sleep(0.5)

    converse(conversation)
