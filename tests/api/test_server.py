"""Parts of requests that are too large, or too slow: the connection ends, and nothing else."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from blipq_api import server
from blipq_api.server import MOST_HEADER_BYTES, BoundedProtocol

HEAD = b"POST / HTTP/1.1\r\nHost: localhost\r\n"
OPTIONS: dict[str, Any] = {"ws": "none", "lifespan": "off", "log_config": None, "access_log": False}

Conversation = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the number of bytes of the body; on /unread without it, /long at length."""
    if scope["path"] != "/":
        await unread(scope["path"] == "/long", send)
        return
    size, more = 0, True
    while more:
        message = await receive()
        size += len(message.get("body", b""))
        more = message.get("more_body", False)
    length = (b"content-length", str(len(str(size))).encode())
    await send({"type": "http.response.start", "status": 200, "headers": [length]})
    await send({"type": "http.response.body", "body": str(size).encode()})


async def unread(long: bool, send: Any) -> None:
    size = 2**25 if long else 1
    length = (b"content-length", str(size).encode())
    await send({"type": "http.response.start", "status": 200, "headers": [length]})
    await send({"type": "http.response.body", "body": b"0" * size})


def converse(conversation: Conversation, app: Any = app, **options: Any) -> None:
    """Serves one connection, in this process."""
    config = uvicorn.Config(app, http=BoundedProtocol, **OPTIONS | options)
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


CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize("before", [b"0\r\n", b"1\r\nx\r\n0\r\n", b"1"])
@pytest.mark.parametrize("line", [b"X: %s\r\n" % (b"x" * 1000), b"x" * 1000])
def test_what_surrounds_the_parts_of_a_body_is_cut_off_where_it_never_ends(
    before: bytes, line: bytes
) -> None:
    """Trailers, one trailer, and the extensions of a chunk."""
    line = b";" + line.strip() if before == b"1" else line

    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED + before)
        for _ in range(8 * MOST_HEADER_BYTES // len(line)):
            writer.write(line)
        assert await ends(reader)

    converse(conversation)


@pytest.mark.parametrize("before", [HEAD, CHUNKED + b"0\r\n"])
def test_headers_and_trailers_are_so_many_at_most(before: bytes) -> None:
    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(before + b"X: x\r\n" * (2 * server.MOST_HEADERS))
        assert await ends(reader)

    converse(conversation)


def test_a_trailer_is_read_and_becomes_no_header() -> None:
    seen: list[Any] = []

    async def keeping(scope: Any, receive: Any, send: Any) -> None:
        await app(scope, receive, send)
        seen.extend(name for name, _ in scope["headers"])

    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(2):  # on one connection
            writer.write(CHUNKED + b"2\r\nxx\r\n0\r\nAuthorization: Bearer x\r\n\r\n")
            assert await answer(reader) == "2"

    converse(conversation, keeping)
    assert seen == [b"host", b"transfer-encoding"] * 2


def test_small_chunks_of_a_long_body_are_no_overhead() -> None:
    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED)
        for _ in range(8):
            writer.write(b"1;name=value\r\nx\r\n" * 10_000)
            await writer.drain()
        writer.write(b"0\r\n\r\n")
        assert await answer(reader) == "80000"

    converse(conversation)


UNREAD = HEAD.replace(b"/ ", b"/unread ")


@pytest.mark.parametrize(
    "head", [b"Content-Length: 1000000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\nfffff\r\n"]
)
def test_a_body_that_trickles_in_behind_its_answer_ends_the_connection(
    monkeypatch: pytest.MonkeyPatch, head: bytes
) -> None:
    monkeypatch.setattr(server, "LATE_BODY_TIMEOUT_S", 0.3)

    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(UNREAD + head)
        assert await answer(reader) == "0"
        sending = asyncio.ensure_future(slow(reader, writer))
        assert await ends(reader)
        sending.cancel()

    converse(conversation)


def test_a_body_behind_its_answer_has_a_largest_size() -> None:
    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(UNREAD + b"Content-Length: %d\r\n\r\n" % 2**30)
        assert await answer(reader) == "0"
        with pytest.raises(ConnectionError):
            await send_much(writer)

    async def send_much(writer: asyncio.StreamWriter) -> None:
        for _ in range(2**14):
            writer.write(b"x" * 2**16)
            await writer.drain()

    converse(conversation)


def test_a_short_body_behind_its_answer_costs_no_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server, "LATE_BODY_TIMEOUT_S", 0.5)

    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(2):
            writer.write(UNREAD + b"Content-Length: 2\r\n\r\nx")
            assert await answer(reader) == "0"
            writer.write(b"x")
            await asyncio.sleep(0.7)
        writer.write(HEAD + b"Content-Length: 0\r\n\r\n")
        assert await answer(reader) == "0"

    converse(conversation)


@pytest.mark.parametrize("late", [b"x", b"x\r\n"])
def test_a_connection_that_waits_for_nothing_ends_whatever_came_behind_the_answer(
    monkeypatch: pytest.MonkeyPatch, late: bytes
) -> None:
    """The end of a body, and an empty line: each ended uvicorn's own timer."""
    monkeypatch.setattr(server, "HEADER_TIMEOUT_S", 0.5)

    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(UNREAD + b"Content-Length: 1\r\n\r\n")
        assert await answer(reader) == "0"
        writer.write(late)
        assert await ends(reader)

    converse(conversation, timeout_keep_alive=1)


def test_a_client_that_takes_no_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "WRITE_TIMEOUT_S", 0.3)

    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(HEAD.replace(b"/ ", b"/long ") + b"Content-Length: 0\r\n\r\n")
        await asyncio.sleep(1.5)
        writer.transport.resume_reading()  # type: ignore[attr-defined]
        taken = 0
        try:
            while part := await reader.read(2**20):
                taken += len(part)
        except ConnectionResetError:
            pass
        assert taken < 2**25

    converse(conversation)
