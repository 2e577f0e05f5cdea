"""Bytes become messages however they are cut, and nothing is read beyond what is announced."""

import socket
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blipq_worker.inference import ProtocolError
from blipq_worker.inference.protocol import (
    FROM_FRONTS,
    HEADER_SIZE,
    Cancel,
    Hello,
    Submit,
    Vocabulary,
    encoded,
)
from blipq_worker.inference.stream import Ended, Reader
from worker.inference.stand_in import SIZE, item

PIXELS = bytes(range(256)) * (SIZE // 256)
ITEM = Submit("default", "normal", 60.0, item())
LONG = Submit("default", "normal", 60.0, item(prompt="x" * 30_000))


class Pair:
    """A reader, and the other end of its socket. lent: rooms that were asked for."""

    def __init__(self, room: bool = True) -> None:
        self.end, self.source = socket.socketpair()
        self.lent: list[int] = []
        self.room = room
        self.reader = Reader(self.source, Vocabulary(FROM_FRONTS), self.lend)

    def lend(self, message: Any, size: int) -> memoryview | None:
        self.lent.append(size)
        return memoryview(bytearray(size)) if self.room else None

    def close(self) -> None:
        self.end.close()
        self.source.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    with closing(Pair()) as pair:
        yield pair


STREAM = (
    encoded(Hello(1, "front"), 0)
    + encoded(ITEM, 1, SIZE)
    + PIXELS
    + encoded(Cancel(), 1)
    + encoded(LONG, 2)
    + encoded(ITEM, 3, 7)
    + b"1234567"
)


@settings(deadline=None)
@given(st.lists(st.integers(1, 60_000), max_size=12))
def test_messages_are_the_same_however_the_stream_is_cut(cuts: list[int]) -> None:
    with closing(Pair()) as pair:
        frames, start = [], 0
        for size in [*cuts, *[50_000] * 5]:
            pair.end.sendall(STREAM[start : start + size])
            start += size
            while (frame := pair.reader.receive()) is not None:
                frames.append(frame)
        assert [frame.id for frame in frames] == [0, 1, 1, 2, 3]
        pixels = [bytes(frame.pixels) for frame in frames if frame.pixels is not None]
        assert pixels == [PIXELS, b"1234567"]
        assert frames[3].message.item.prompts == ("x" * 30_000,)
        assert pair.reader.between


def test_a_message_that_is_not_whole_is_waited_for(pair: Pair) -> None:
    data = encoded(ITEM, 1, SIZE) + PIXELS
    pair.end.sendall(data[:-1])
    assert pair.reader.receive() is None
    assert not pair.reader.between
    assert pair.reader.lent is not None
    pair.end.sendall(data[-1:])
    assert pair.reader.receive() is not None
    assert pair.reader.lent is None


@pytest.mark.parametrize("end", [0, 1, HEADER_SIZE, HEADER_SIZE + 5, 5_000])
def test_a_stream_that_ends_is_told_from_one_that_pauses(pair: Pair, end: int) -> None:
    pair.end.sendall((encoded(ITEM, 1, SIZE) + PIXELS)[:end])
    pair.end.shutdown(socket.SHUT_WR)
    with pytest.raises(Ended):
        pair.reader.receive()


def test_a_long_body_takes_memory_only_as_it_comes(pair: Pair) -> None:
    """A header may announce 4 MiB: 64 such headers must not cost 256 MiB."""
    data = bytearray(encoded(ITEM, 1))
    data[12:16] = (4 * 2**20).to_bytes(4, "little")
    pair.end.sendall(data)
    assert pair.reader.receive() is None
    assert len(pair.reader._target) + len(pair.reader._body) < 2**17


def test_no_room_is_asked_for_before_the_request_is_known(pair: Pair) -> None:
    pair.end.sendall(encoded(ITEM, 1, SIZE)[:-1])
    assert pair.reader.receive() is None
    assert pair.lent == []


def test_a_reader_without_room_reads_nothing_until_there_is_some(pair: Pair) -> None:
    pair.room = False
    pair.end.sendall(encoded(ITEM, 1, 7) + b"1234567")
    assert pair.reader.receive() is None
    assert pair.reader.starved
    pair.room = True
    frame = pair.reader.receive()
    assert frame is not None
    assert bytes(frame.pixels or b"") == b"1234567"
    assert not pair.reader.starved


def test_what_comes_after_a_bad_message_is_not_read(pair: Pair) -> None:
    pair.end.sendall(b"\0" * 100)
    with pytest.raises(ProtocolError):
        pair.reader.receive()
