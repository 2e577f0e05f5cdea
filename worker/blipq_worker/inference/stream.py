"""Puts the bytes of a stream together to messages, and never takes more than is announced."""

import socket
from dataclasses import dataclass
from typing import Any, Protocol

from blipq_worker.inference.protocol import HEADER_SIZE, Header, ProtocolError, Vocabulary

#: Read at once where less is wanted: a header, a usual body, and the first pixels.
_AHEAD = 4096
#: Of a long body so much is allocated before it has come.
_CHUNK = 64 * 1024


class Ended(Exception):
    """The other side has closed the stream."""


class Lender(Protocol):
    """Says where pixels go."""

    def __call__(self, message: Any, size: int) -> memoryview | None:
        """Room for exactly ``size`` bytes; None: none now, ask again. Raises ProtocolError."""


def no_pixels(message: Any, size: int) -> memoryview | None:
    """A lender for streams without pixels."""
    raise ProtocolError(f"{size:,} bytes of pixels for {type(message).__name__}")


@dataclass(frozen=True, slots=True)
class Frame:
    """A whole message. pixels: the room that was lent, filled."""

    id: int
    message: Any
    pixels: memoryview | None


class Reader:
    """Reads messages off a stream socket. Of one thread.

    Small parts are read through a buffer, so that a small message costs one call; pixels go
    straight to where they were lent room.
    """

    def __init__(self, source: socket.socket, vocabulary: Vocabulary, lend: Lender) -> None:
        self._source, self._vocabulary, self._lend = source, vocabulary, lend
        self._ahead = memoryview(bytearray(_AHEAD))
        self._start = self._end = 0
        self._head = memoryview(bytearray(HEADER_SIZE))
        #: Waits for room for pixels; the socket is not read meanwhile.
        self.starved = False
        self._begin()

    @property
    def between(self) -> bool:
        """Whether no message has begun."""
        return self._header is None and self._got == 0 and self._start == self._end

    @property
    def lent(self) -> memoryview | None:
        """Room that is lent to a message which is not whole."""
        return self._pixels

    def receive(self) -> Frame | None:
        """The next message; None where the rest has not come.

        Raises Ended, ProtocolError and OSError: after that the stream is of no use.
        """
        while True:
            while self._got < len(self._target):
                if not self._more():
                    return None
            frame = self._advance()
            if frame is not None:
                return frame
            if self.starved:
                return None

    # -- bytes --

    def _more(self) -> bool:
        """Puts some bytes where they are wanted; False where none have come."""
        wanted = self._target[self._got :]
        if self._start == self._end:
            if len(wanted) >= _AHEAD:
                count = self._received(wanted)
                self._got += count
                return count > 0
            self._start, self._end = 0, self._received(self._ahead)
        count = min(len(wanted), self._end - self._start)
        wanted[:count] = self._ahead[self._start : self._start + count]
        self._start += count
        self._got += count
        return count > 0

    def _received(self, into: memoryview) -> int:
        """Bytes received; 0 where none have come."""
        try:
            count = self._source.recv_into(into, 0, socket.MSG_DONTWAIT)
        except (BlockingIOError, InterruptedError):
            return 0
        if count == 0:
            raise Ended("the other side has closed the connection")
        return count

    # -- messages --

    def _begin(self) -> None:
        self._header: Header | None = None
        self._body = bytearray()
        self._message: Any = None
        self._pixels: memoryview | None = None
        self._want(self._head)

    def _want(self, target: memoryview) -> None:
        self._target, self._got = target, 0

    def _advance(self) -> Frame | None:
        """What was wanted has come: goes on to the next part, or hands the whole message out."""
        if self._header is None:
            self._header = Header.unpacked(self._head)
            self._vocabulary.check(self._header)
            self._want_body(self._header)
            return None
        if self._message is None:
            self._body += self._target
            if len(self._body) < self._header.body:
                self._want_body(self._header)
                return None
            self._message = self._vocabulary.decoded(self._header, self._body)
        if self._pixels is None and self._header.blob:
            self._want_pixels(self._header)
            return None
        frame = Frame(self._header.id, self._message, self._pixels)
        self._begin()
        return frame

    def _want_body(self, header: Header) -> None:
        self._want(memoryview(bytearray(min(_CHUNK, header.body - len(self._body)))))

    def _want_pixels(self, header: Header) -> None:
        self._pixels = self._lend(self._message, header.blob)
        self.starved = self._pixels is None
        self._want(memoryview(b"") if self._pixels is None else self._pixels)
