"""A connected front, as its engine sees it. Of the engine's thread."""

import hashlib
import select
import socket
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from weakref import WeakValueDictionary

from blipq_worker.inference.interface import Handle
from blipq_worker.inference.protocol import FROM_FRONTS, ProtocolError, Vocabulary
from blipq_worker.inference.requests import Origin
from blipq_worker.inference.stream import Reader

#: What a front may leave unread: all its credits' worth of usual features.
MOST_UNREAD = 32 * 2**20
#: Of images that one front has named, the latest used: some 300 bytes each.
MOST_NAMES = 4096
_VOCABULARY = Vocabulary(FROM_FRONTS)


class Names:
    """What a front calls images, by model, and what they are.

    A front names an image by the digest of its file, which the engine never sees: a front that a
    hostile picture has taken over could give any pixels any name, and what is known of one image
    would answer for another one, for all fronts. So an image's name in the engine is the digest of
    its pixels, taken here, and each front's own names lead there.
    """

    def __init__(self) -> None:
        self._digests: dict[tuple[str, str], str] = {}

    def learned(self, model: str, name: str, pixels: memoryview) -> str:
        """The digest of an image's pixels, which the front calls ``name``."""
        digest = hashlib.sha256(pixels).hexdigest()
        self._put((model, name), digest)
        if len(self._digests) > MOST_NAMES:
            del self._digests[next(iter(self._digests))]
        return digest

    def get(self, model: str, name: str) -> str | None:
        """The digest of the pixels that the front has sent under this name, if it is remembered."""
        digest = self._digests.get((model, name))
        if digest is not None:
            self._put((model, name), digest)
        return digest

    def forget(self, model: str, name: str) -> str | None:
        """Drops a name; the digest that it led to."""
        return self._digests.pop((model, name), None)

    def _put(self, key: tuple[str, str], digest: str) -> None:
        self._digests.pop(key, None)  # the latest used is the last
        self._digests[key] = digest


#: Images of items that are in flight, by the front's numbers and by what they are: whatever numbers
#: a front makes up, no image has the features of another one that has a name.
Origins = WeakValueDictionary[tuple[int, str | None], Origin]


class Unread(ProtocolError):
    """The front does not read what it is sent."""


@dataclass(slots=True, eq=False)
class Work:
    """A submitted item. row: its pixels' room. over: it was answered."""

    front: "Front"
    id: int
    row: memoryview | None
    handle: Handle = None
    over: bool = False


@dataclass(slots=True, eq=False)
class Front:
    """A connection and all that belongs to it. Times are of the server's clock.

    begun: when the present message, or the wait for Hello, began. stuck: since when nothing of
    what is unread has gone out. deaf_until: no pass waits for it to read before that. watched: what
    epoll reports.
    """

    socket: socket.socket
    pid: int
    begun: float
    lend: "Callable[[Front, object, int], memoryview | None]"
    name: str = ""
    greeted: bool = False
    works: dict[int, Work] = field(default_factory=dict)
    names: Names = field(default_factory=Names)
    origins: Origins = field(default_factory=WeakValueDictionary)
    stuck: float = 0.0
    deaf_until: float = 0.0
    watched: int = 0
    reader: Reader = field(init=False)
    _unread: deque[memoryview] = field(default_factory=deque)
    _unread_bytes: int = 0

    def __post_init__(self) -> None:
        """Starts reading."""
        self.reader = Reader(self.socket, _VOCABULARY, partial(self.lend, self))

    def __str__(self) -> str:
        return f"front {self.name or '?'} (pid {self.pid})"

    @property
    def has_unread(self) -> bool:
        """Whether something waits until the front reads."""
        return bool(self._unread)

    @property
    def events(self) -> int:
        """What to wait for."""
        reads = 0 if self.reader.starved else select.EPOLLIN
        return reads | (select.EPOLLOUT if self._unread else 0)

    def send(self, data: bytes, now: float) -> None:
        """Sends as much as goes, and keeps the rest. Raises OSError, and Unread for too much."""
        if not self._unread:
            self.stuck = now
        self._unread.append(memoryview(data))
        self._unread_bytes += len(data)
        self.flush(now)
        if self._unread_bytes > MOST_UNREAD:
            raise Unread(f"{self._unread_bytes:,} bytes unread")

    def flush(self, now: float) -> None:
        """Sends what goes of the rest. Raises OSError."""
        while self._unread:
            try:
                sent = self.socket.send(self._unread[0], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except (BlockingIOError, InterruptedError):
                return
            self.stuck = now
            self._unread_bytes -= sent
            if sent == len(self._unread[0]):
                self._unread.popleft()
            else:
                self._unread[0] = self._unread[0][sent:]
