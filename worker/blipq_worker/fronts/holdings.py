"""What a front holds, on record where its death cannot take it.

A front is killed without a word: by the kernel, by a picture that breaks a decoder, by hand. What
it had taken by then is in its file of holdings, from which the worker's main process gives it back.
The file is mapped into memory: what a process has written there stays when it dies, and costs no
system call.

Each record has two parts with a checksum each, of the message and of the claim, and one byte that
says how far its job has come. A part is written while the byte does not count it yet, so a record
is whole at whatever instruction its writer dies.
"""

import logging
import mmap
import os
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from struct import Struct
from typing import Any, Literal, NamedTuple

import msgspec

from blipq.contract import Kind
from blipq.ledger.worker import Claim

log = logging.getLogger(__name__)

Stage = Literal["taken", "claimed", "decoding", "suspect"]

_MAGIC = b"blipq holdings 1"
#: The file begins with the magic and fills one record: all others are aligned.
_RECORD = 2048
_FREE, _TAKEN, _CLAIMED, _DECODING, _SUSPECT = range(5)
_STAGES: dict[int, Stage] = {
    _TAKEN: "taken",
    _CLAIMED: "claimed",
    _DECODING: "decoding",
    _SUSPECT: "suspect",
}
_HEAD = Struct("<IH")  # checksum and length of a part


class _Part(NamedTuple):
    """Where a part lies in its record: its head, and the bytes that it may have behind it."""

    start: int
    size: int


_MESSAGE, _CLAIM = _Part(16, 1520), _Part(1536, 512)

_Message = tuple[str, str, str]  # id, kind, queue
_Claim = tuple[str, bool, str, str]  # token, solo, nonce, queue of the job; "" for none

_NO_CLAIM: _Claim = ("", False, "", "")


@dataclass(frozen=True, slots=True)
class Holding:
    """A message that a front had not acknowledged, and what had become of its job.

    queue: where the message came from, and once it is claimed the job's own. token, solo: of the
    claim; None and False in stage ``taken``. A ``suspect`` is claimed, and may have ended its
    engine. nonce: in stage ``taken``, that of a claim which was requested and may have been
    granted: it is to be withdrawn.
    """

    id: str
    kind: Kind
    queue: str
    token: str | None = None
    solo: bool = False
    stage: Stage = "taken"
    nonce: str | None = None


@dataclass(slots=True)
class _Place:
    """A record in use. messages: of this job that are held; pictures: that are decoded now."""

    offset: int
    messages: int = 0
    pictures: int = 0


class Holdings:
    """A front's own holdings. Thread-safe; a call waits for nothing.

    places: jobs that are noted at once. Beyond them, and where a text is longer than its part,
    nothing is noted: after the front's death such jobs wait for the reconciler. What lies at
    ``path`` is replaced. Raises OSError.
    """

    def __init__(self, path: Path, places: int) -> None:
        self._lock = threading.Lock()
        self._places: dict[str, _Place] = {}
        self._free = list(range(_RECORD * places, 0, -_RECORD))
        self._map = _created(path, _RECORD * (places + 1))

    def take(self, id: str, kind: Kind, queue: str) -> None:
        """Notes a message before anything is done with it."""
        with self._lock:
            place = self._placed(id, kind, queue)
            if place is not None:
                place.messages += 1

    def asking(self, id: str, nonce: str) -> None:
        """Notes that a claim is requested: it may be granted without an answer that arrives."""
        with self._lock:
            self._note(id, ("", False, nonce, ""), _TAKEN)

    def claimed(self, claim: Claim) -> None:
        """Notes a claim."""
        with self._lock:
            self._placed(claim.id, claim.kind, claim.queue)
            self._note(claim.id, (claim.token, claim.solo, "", claim.queue), _CLAIMED)

    @contextmanager
    def decoding(self, id: str) -> Iterator[None]:
        """While a picture of the job is decoded; several may be, at the same time."""
        with self._lock:
            place = self._places.get(id)
            if place is not None:
                place.pictures += 1
                self._move(id, place, _CLAIMED, _DECODING)
        try:
            yield
        finally:
            with self._lock:
                if place is not None:
                    place.pictures -= 1
                    if place.pictures == 0:
                        self._move(id, place, _DECODING, _CLAIMED)

    def suspect(self, id: str) -> None:
        """Notes that a claimed job may have ended its engine."""
        with self._lock:
            place = self._places.get(id)
            # A stage "decoding" is of an engine that is gone as well: nobody waits for its picture.
            if place is not None and self._map[place.offset] != _TAKEN:
                self._map[place.offset] = _SUSPECT

    def unclaimed(self, id: str) -> None:
        """The claim has ended, or none was granted. The message, if any, is still to be settled."""
        with self._lock:
            place = self._places.get(id)
            if place is None:
                return
            self._note(id, _NO_CLAIM, _TAKEN)
            self._leave(id, place)

    def release(self, id: str) -> None:
        """A message is acknowledged, or back in its queue."""
        with self._lock:
            place = self._places.get(id)
            if place is not None:
                place.messages = max(0, place.messages - 1)
                self._leave(id, place)

    # -- with the lock held --

    def _placed(self, id: str, kind: Kind, queue: str) -> _Place | None:
        """The job's record, written anew if there is none; None if there is no room."""
        place = self._places.get(id)
        if place is not None or not self._free:
            return place
        place = _Place(self._free[-1])
        if not self._write(place.offset, _MESSAGE, (id, str(kind), queue)):
            return None
        self._write(place.offset, _CLAIM, _NO_CLAIM)
        self._free.pop()
        self._places[id] = place
        self._map[place.offset] = _TAKEN
        return place

    def _note(self, id: str, claim: _Claim, stage: int) -> None:
        """Replaces what is noted of a claim."""
        place = self._places.get(id)
        if place is None:
            return
        # First the byte: who dies in between leaves a message whose claim is not known.
        self._map[place.offset] = _TAKEN
        if self._write(place.offset, _CLAIM, claim):
            self._map[place.offset] = stage

    def _move(self, id: str, place: _Place, before: int, after: int) -> None:
        """Changes a job's stage, unless another job has its record by now."""
        if self._places.get(id) is place and self._map[place.offset] == before:
            self._map[place.offset] = after

    def _leave(self, id: str, place: _Place) -> None:
        """Frees the record of a job without a message and without a claim."""
        if place.messages == 0 and self._map[place.offset] == _TAKEN:
            self._map[place.offset] = _FREE
            del self._places[id]
            self._free.append(place.offset)

    def _write(self, offset: int, part: _Part, value: _Message | _Claim) -> bool:
        """Whether the part has room for it."""
        data = msgspec.msgpack.encode(value)
        if len(data) > part.size - _HEAD.size:
            return False
        head = offset + part.start
        start = head + _HEAD.size
        self._map[start : start + len(data)] = data
        _HEAD.pack_into(self._map, head, zlib.crc32(data), len(data))
        return True


def read_holdings(path: Path) -> list[Holding]:
    """What a front holds, or held when it died; nothing where there is no such file.

    Records that are not whole are left out, and so is a file that is none of holdings.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    if not data.startswith(_MAGIC):
        log.error("%s: no file of holdings", path)
        return []
    records = (data[start : start + _RECORD] for start in range(_RECORD, len(data), _RECORD))
    return [found for record in records if (found := _holding(record)) is not None]


def _holding(record: bytes) -> Holding | None:
    stage = _STAGES.get(record[0])
    if stage is None or len(record) < _RECORD:
        return None
    try:
        id, kind, queue = _read(record, _MESSAGE, _Message)
        message = Holding(id, Kind(kind), queue)
    except ValueError as error:
        log.warning("a record of holdings is skipped: %s", error)
        return None
    try:
        token, solo, nonce, own = _read(record, _CLAIM, _Claim)
    except ValueError:  # the writer died in between: what is known of the message holds
        return message
    if stage == "taken":
        return Holding(id, message.kind, queue, nonce=nonce or None)
    return Holding(id, message.kind, own, token, solo, stage)


def _read(record: bytes, part: _Part, type: Any) -> Any:
    """A part. Raises ValueError for one that is not whole."""
    checksum, length = _HEAD.unpack_from(record, part.start)
    start = part.start + _HEAD.size
    data = record[start : start + length]
    if length > part.size - _HEAD.size or zlib.crc32(data) != checksum:
        raise ValueError("it is not whole")
    return msgspec.msgpack.decode(data, type=type)


def _created(path: Path, size: int) -> mmap.mmap:
    """A new file of this size, mapped; nobody sees it before it is whole."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    file = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        # A mapped page without a place on a full disk ends its writer with SIGBUS.
        os.posix_fallocate(file, 0, size)
        mapped = mmap.mmap(file, size)
        mapped[: len(_MAGIC)] = _MAGIC
        fresh.replace(path)
    finally:
        os.close(file)
    return mapped
